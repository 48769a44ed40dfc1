import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_head
from mmseg.models.losses import accuracy

from internseg_ds.models.pixel_losses import losses_without_waits, pixel_accuracy

IGNORED = 255


@pytest.mark.parametrize(("classes", "ignored"), [(7, 0.3), (1, 0.5), (150, 0.0), (3, 1.0)])
def test_the_share_of_right_pixels_is_mmsegs(classes, ignored):
    torch.manual_seed(0)
    scores = torch.randn(2, classes, 13, 17)
    labels = torch.randint(0, classes, (2, 13, 17))
    labels[torch.rand(labels.shape) < ignored] = IGNORED
    torch.testing.assert_close(
        pixel_accuracy(scores, labels, IGNORED), accuracy(scores, labels, ignore_index=IGNORED)
    )


def test_a_class_that_is_ignored_counts_neither_as_right_nor_at_all():
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 4, 13, 17), torch.randint(0, 4, (2, 13, 17))
    torch.testing.assert_close(pixel_accuracy(scores, labels, 2), accuracy(scores, labels, ignore_index=2))


def head_of(loss, **more):
    torch.manual_seed(0)
    return build_head(
        ConfigDict(
            type="UPerHead",
            in_channels=[4] * 4,
            in_index=[0, 1, 2, 3],
            channels=4,
            num_classes=5,
            loss_decode=loss,
            **more,
        )
    )


@pytest.mark.parametrize(
    ("loss", "more"),
    [
        (dict(type="CrossEntropyLoss", loss_weight=0.7), {}),
        (
            [
                dict(type="CrossEntropyLoss"),
                dict(type="DiceLoss", loss_name="loss_dice"),
                dict(type="CrossEntropyLoss", loss_weight=0.5),
            ],
            {},
        ),
        (
            dict(type="CrossEntropyLoss"),
            dict(sampler=dict(type="OHEMPixelSampler", thresh=0.7, min_kept=20), align_corners=True),
        ),
    ],
)
def test_losses_are_mmsegs_under_their_names(loss, more):
    labels = torch.randint(0, 5, (2, 1, 24, 24))
    labels[0, 0, :5] = IGNORED
    logits = torch.randn(2, 5, 6, 6)
    theirs, ours = head_of(loss, **more), head_of(loss, **more)
    losses_without_waits(_segmentor(ours))
    expected, found = theirs.losses(logits, labels), ours.losses(logits, labels)
    assert list(expected) == list(found) and type(ours) is not type(theirs) and isinstance(ours, type(theirs))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def _segmentor(head: torch.nn.Module) -> torch.nn.Module:
    segmentor = torch.nn.Module()
    segmentor.decode_head = head
    return segmentor


def test_a_head_with_losses_of_its_own_stays_as_it_is():
    head = build_head(
        ConfigDict(
            type="DAHead",
            in_channels=4,
            in_index=0,
            channels=4,
            pam_channels=2,
            num_classes=5,
            loss_decode=dict(type="CrossEntropyLoss"),
        )
    )
    kind = type(head)
    losses_without_waits(_segmentor(head))
    assert type(head) is kind


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        (dict(type="LovaszLoss", reduction="none"), 5),
        (dict(type="LovaszLoss", per_image=True, loss_weight=2.0), 5),
        (dict(type="CrossEntropyLoss", use_sigmoid=True), 2),
    ],
)
def test_images_that_are_ignored_as_a_whole_cost_nothing(loss, classes):
    more = dict(num_classes=classes, out_channels=1 if classes == 2 else classes, threshold=0.3)
    theirs, ours = (
        build_head(ConfigDict(type="FCNHead", in_channels=4, channels=4, loss_decode=loss, **more))
        for _ in range(2)
    )
    losses_without_waits(_segmentor(ours))
    name, logits = (
        theirs.loss_decode.loss_name,
        torch.randn(2, more["out_channels"], 6, 6, requires_grad=True),
    )
    labels = torch.randint(0, classes, (2, 1, 24, 24))
    torch.testing.assert_close(ours.losses(logits, labels)[name], theirs.losses(logits, labels)[name])
    one, none = labels.clone(), torch.full_like(labels, IGNORED)
    one[1] = IGNORED
    # a mean over both images
    halves = 2 if loss["type"] == "CrossEntropyLoss" or loss.get("per_image") else 1
    torch.testing.assert_close(
        ours.losses(logits, one)[name], theirs.losses(logits[:1], labels[:1])[name] / halves
    )
    value = ours.losses(logits, none)[name]
    value.backward()
    assert value == 0 and not logits.grad.any()
