"""Losses that cannot work for a data set's labels, as configs name them, and those that can."""

import pytest
import torch
from mmseg.models import LOSSES, build_head
from torch import nn

from internseg_ds.errors import ConfigError
from internseg_ds.preflight.loss_trial import try_losses

SOUND = [
    dict(type="CrossEntropyLoss"),
    dict(type="CrossEntropyLoss", class_weight=[1.0, 2.0, 0.5]),
    dict(type="CrossEntropyLoss", use_sigmoid=True),
    dict(type="CrossEntropyLoss", avg_non_ignore=True),
    dict(type="FocalLoss"),
    dict(type="FocalLoss", class_weight=[1.0, 2.0, 0.5]),
    dict(type="DiceLoss"),
    dict(type="TverskyLoss"),
    dict(type="LovaszLoss", reduction="none"),
    dict(type="LovaszLoss", per_image=True),
    [dict(type="CrossEntropyLoss", loss_name="loss_ce"), dict(type="DiceLoss", loss_name="loss_dice")],
]


def said_of(loss, *, ignore_index=255, classes=3, micro_batch=2, **head):
    settings = (
        dict(type="FCNHead", in_channels=4, channels=4, num_convs=1, concat_input=False, num_classes=3) | head
    )
    built = build_head(settings | dict(loss_decode=loss))
    return try_losses([(built, built([torch.zeros(1, 4, 28, 28)]))], classes, [ignore_index], micro_batch)


@pytest.mark.parametrize("loss", SOUND, ids=str)
def test_the_losses_of_mmseg_pass(loss):
    said_of(loss)


def test_hard_pixels_are_sampled_as_in_training():
    assert said_of(SOUND[0], sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=100)) == []


OHEM_OF_LOSSES = dict(type="OHEMPixelSampler", min_kept=100)


def test_a_sampler_that_wants_losses_of_pixels_from_one_of_images_is_refused_where_there_are_several_images():
    losses = [
        dict(type="CrossEntropyLoss", loss_name="loss_ce"),
        dict(type="LovaszLoss", per_image=True, loss_name="loss_lovasz"),
    ]
    words = (
        r"FCNHead cannot be computed .* in 2 images: .*\(CrossEntropyLoss, LovaszLoss\) .* as "
        r"OHEMPixelSampler without"
    )
    with pytest.raises(ConfigError, match=words):
        said_of(losses, sampler=OHEM_OF_LOSSES)
    said_of(losses, sampler=OHEM_OF_LOSSES, micro_batch=1)  # of which mmseg's sampler takes the one value
    said_of(losses, sampler=dict(OHEM_OF_LOSSES, thresh=0.7))
    said_of(losses[:1], sampler=OHEM_OF_LOSSES)


def test_more_outputs_than_classes_pass():
    assert said_of(SOUND[0], num_classes=19) == []


def test_one_output_with_a_sigmoid_passes_and_mmsegs_failure_without_labels_is_said():
    (said,) = said_of(SOUND[2], num_classes=2, out_channels=1, classes=2)
    assert "FCNHead" in said and "without a labelled pixel" in said and "would end the run" in said


@pytest.mark.parametrize(
    ("loss", "head", "words"),
    [
        (
            dict(type="CrossEntropyLoss", class_weight=[1.0, 2.0]),
            {},
            "FCNHead cannot be computed for labels 0 to 2 and 255",
        ),
        (dict(type="CrossEntropyLoss", use_sigmoid=True, class_weight=[1.0, 2.0]), {}, "class_weight"),
        # mmseg multiplies it with columns
        (dict(type="CrossEntropyLoss", use_sigmoid=True, class_weight=[1.0, 2.0, 0.5]), {}, "class_weight"),
        (dict(type="FocalLoss", class_weight=[1.0, 2.0]), {}, "class_weight"),
        (dict(type="CrossEntropyLoss"), dict(ignore_index=254), "ignore_index"),
        (dict(type="CrossEntropyLoss"), dict(num_classes=2), "num_classes"),
        (dict(type="CrossEntropyLoss", loss_weight=float("nan")), {}, "is nan for ordinary scores"),
    ],
)
def test_a_loss_that_cannot_work_is_named_with_its_mend(loss, head, words):
    with pytest.raises(ConfigError, match=words):
        said_of(loss, **head)


class MeanOfLabelled(nn.Module):
    loss_name = "loss_mean"

    def forward(self, scores, labels, weight=None, ignore_index=255):
        return scores.max(1).values[labels != ignore_index].mean()


def test_a_loss_that_is_not_finite_without_labels_is_said():
    LOSSES.register_module(MeanOfLabelled, force=True)
    (said,) = said_of(dict(type="MeanOfLabelled"))
    assert "loss_mean of FCNHead" in said


def test_a_loss_of_weight_0_is_said():
    (said,) = said_of(dict(type="CrossEntropyLoss", loss_weight=0.0))
    assert "FCNHead learns nothing" in said and "loss_weight 0" in said
