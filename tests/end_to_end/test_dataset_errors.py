"""Data sets and pipelines that cannot be meant are refused before anything is built; joined ones that can be pass."""

import copy
from dataclasses import replace

import pytest
from mmcv import ConfigDict
from mmseg.datasets import DATASETS, build_dataset
from mmseg.datasets.builder import PIPELINES
from torch.utils.data import Dataset

from internseg_ds.errors import ConfigError, DataError
from tests.conftest import MASK2FORMER, TINY
from tests.end_to_end.conftest import checked, experiment_of


def test_the_score_of_one_of_several_validation_sets_may_say_which_is_best(ade20k):
    options = {
        "evaluation.save_best": "1_mIoU",
        "data.val.img_dir": ["images/validation"] * 2,
        "data.val.ann_dir": ["annotations/validation"] * 2,
    }
    experiment = experiment_of(TINY, ade20k, options)
    assert checked(experiment).experiment.evaluation.best_by == "1_mIoU"


def test_a_step_of_a_wrapper_counts_too(ade20k):
    experiment = experiment_of(MASK2FORMER, ade20k)
    steps = experiment.train.pipeline
    made = [step["type"] for step in steps].index("ToMask")
    inner, outer = (
        ConfigDict(experiment.train, pipeline=steps[: made + 1]),
        [dict(type="RandomFlip", prob=1.0), *steps[made + 1 :]],
    )
    mixed = replace(experiment, train=ConfigDict(type="MultiImageMixDataset", dataset=inner, pipeline=outer))
    with pytest.raises(ConfigError, match="has RandomFlip after ToMask"):
        checked(mixed)


def test_each_of_several_training_sets_must_do(ade20k):
    experiment = experiment_of(MASK2FORMER, ade20k)
    unmasked = copy.deepcopy(experiment.train)
    unmasked.pipeline = [step for step in unmasked.pipeline if step["type"] != "ToMask"]
    with pytest.raises(DataError, match="KeyError: 'gt_masks'"):
        checked(replace(experiment, train=[experiment.train, unmasked]))
    names = build_dataset(experiment.train).CLASSES
    others = [ConfigDict(experiment.train, classes=names), ConfigDict(experiment.train, classes=names[::-1])]
    mixed = ConfigDict(type="MultiImageMixDataset", dataset=others, pipeline=[])
    for train in (others, mixed):
        with pytest.raises(DataError, match="must mean one class"):
            checked(replace(experiment, train=train))


def test_a_part_without_images_is_named(ade20k, tmp_path):
    experiment = experiment_of(TINY, ade20k)
    nothing = ConfigDict(experiment.train, data_root=str(tmp_path))
    for key in ("img_dir", "ann_dir"):
        (tmp_path / nothing[key]).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{tmp_path}/images/training has no image"):
        checked(replace(experiment, train=[experiment.train, nothing]))


@DATASETS.register_module()
class PlainTorchDataset(Dataset):
    """A data set that knows torch alone."""

    def __init__(self, pipeline):
        pass

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {}


def test_a_data_set_that_is_not_mmsegs_is_told_what_it_lacks(ade20k):
    experiment = experiment_of(TINY, ade20k)
    mine = replace(experiment, train=ConfigDict(type="PlainTorchDataset", pipeline=experiment.train.pipeline))
    with pytest.raises(
        DataError,
        match=r"data\.train: PlainTorchDataset.*pipeline, CLASSES, img_infos;",
    ):
        checked(mine)


def test_each_class_needs_a_colour(ade20k):
    experiment = experiment_of(TINY, ade20k)
    own = dict(
        type="CustomDataset",
        img_suffix=".jpg",
        seg_map_suffix=".png",
        classes=[str(index) for index in range(150)],
    )
    with pytest.raises(ConfigError, match=r"150 classes and 149 colours"):
        checked(replace(experiment, train=ConfigDict(experiment.train, **own, palette=[[0, 0, 0]] * 149)))
    # mmseg draws them
    checked(replace(experiment, train=ConfigDict(experiment.train, **own)))


@pytest.mark.parametrize(
    ("config", "keys", "words"),
    [
        (
            TINY,
            ["img", "gt_semantic_seg", "gt_masks", "gt_labels"],
            "EncoderDecoder cannot train on: got an unexpected keyword argument 'gt_masks'",
        ),
        (
            MASK2FORMER,
            ["img", "gt_semantic_seg"],
            "EncoderDecoderMask2Former cannot train on: missing a required argument: 'gt_masks'",
        ),
    ],
)
def test_a_pipeline_that_does_not_hand_over_what_the_segmentor_takes_is_refused(config, keys, words, ade20k):
    experiment = experiment_of(config, ade20k)
    experiment.train.pipeline[-3:] = [
        {"type": "ToMask"},
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": keys},
    ]
    with pytest.raises(ConfigError, match=words):
        checked(experiment)


@PIPELINES.register_module()
class TurnOverAndHalve:
    """A transform that no list knows."""

    def __call__(self, results):
        results["img"] = results["img"][::-1, :56]
        results["gt_semantic_seg"] = results["gt_semantic_seg"][::-1, :56]
        return results


@pytest.mark.parametrize(
    ("before", "error", "words"),
    [
        ("Resize", ConfigError, "has Resize after ToMask, whose masks would not change with the image"),
        ("RandomFlip", ConfigError, "has RandomFlip after ToMask"),  # which leaves the size as it is
        (
            "TurnOverAndHalve",
            ConfigError,
            r"gt_masks of the first image .* 112 x 112 pixels, and the image with 112 x 56; make it after "
            r"the last step",
        ),
        ("Collect", ConfigError, "has DefaultFormatBundle before ToMask"),
        (None, DataError, "KeyError: 'gt_masks'; does a step of the pipeline make it"),
    ],
)
def test_masks_that_would_not_be_those_of_the_image_are_refused(before, error, words, ade20k):
    experiment = experiment_of(MASK2FORMER, ade20k)
    steps = experiment.train.pipeline
    kinds = [step["type"] for step in steps]
    made = steps.pop(kinds.index("ToMask"))
    if before == "TurnOverAndHalve":
        steps.insert(kinds.index("ToMask"), {"type": before})
        kinds.insert(kinds.index("ToMask"), before)
    if before:
        steps.insert(kinds.index(before), made)
    with pytest.raises(error, match=words):
        checked(experiment)


def test_a_joined_validation_set_passes(ade20k):
    experiment = experiment_of(TINY, ade20k)
    experiment.val.update(
        img_dir=["images/training", "images/validation"],
        ann_dir=["annotations/training", "annotations/validation"],
    )
    assert len(checked(experiment).val_set) == 23 + 7


def test_joined_validation_sets_inside_each_other_are_scored_one_by_one(ade20k):
    experiment = experiment_of(TINY, ade20k)
    both = experiment.val | dict(
        img_dir=["images/training", "images/validation"],
        ann_dir=["annotations/training", "annotations/validation"],
    )
    nested = replace(experiment, val=[both, dict(type="ConcatDataset", datasets=[experiment.val])])
    assert [len(part) for part in checked(nested).val_set.datasets] == [23, 7, 7]


@pytest.mark.parametrize(
    "wrapper", [dict(type="RepeatDataset", times=2), dict(type="ClassBalancedDataset", oversample_thr=0.1)]
)
def test_a_validation_set_that_repeats_its_images_is_refused(wrapper, ade20k):
    experiment = experiment_of(TINY, ade20k)
    repeated = replace(experiment, val=[experiment.val, dict(**wrapper, dataset=experiment.val)])
    with pytest.raises(
        ConfigError,
        match=rf"data\.val of .* is a {wrapper['type']}",
    ):
        checked(repeated)
