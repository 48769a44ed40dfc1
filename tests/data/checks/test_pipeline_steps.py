"""Pipelines whose steps cannot be meant in their order, and those that can."""

import pytest
from mmseg.datasets.pipelines import Compose

from internseg_ds.data.checks.pipeline_steps import check_steps, odd_steps
from internseg_ds.errors import ConfigError
from internseg_ds.evaluation.predict import predict_files
from internseg_ds.evaluation.test import test as evaluate
from tests.conftest import TINY, data_options
from tests.small_experiment import small_experiment

NORMALIZE = dict(type="Normalize", mean=[0.0] * 3, std=[1.0] * 3)
LOAD, LABELS, FLIP = (
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
)
CROP, PHOTO = dict(type="RandomCrop", crop_size=(4, 4)), dict(type="PhotoMetricDistortion")
TRAIN = [
    LOAD,
    LABELS,
    dict(type="Resize", img_scale=(8, 8)),
    CROP,
    FLIP,
    PHOTO,
    NORMALIZE,
    dict(type="Pad", size=(4, 4)),
]


def augmented(*steps, flip=True):
    return dict(
        type="MultiScaleFlipAug", img_scale=(8, 8), img_ratios=[1.0], flip=flip, transforms=list(steps)
    )


TEST = [LOAD, augmented(dict(type="Resize", keep_ratio=True), FLIP, NORMALIZE)]


def built(steps):
    return Compose(steps).transforms


def test_what_published_configs_have_passes_in_silence():
    for steps, evaluates in (
        (TRAIN, False),
        (TEST, True),
        ([LOAD, augmented(NORMALIZE, flip=False)], True),
        ([LOAD, FLIP, NORMALIZE], True),
    ):
        check_steps(built(steps), "data.val", evaluates=evaluates)
        assert odd_steps(built(steps), "data.val", evaluates=evaluates) == []


@pytest.mark.parametrize(
    ("steps", "evaluates", "words"),
    [
        ([LOAD, LABELS, LABELS, FLIP], False, "LoadAnnotations twice"),
        ([LOAD, LABELS, NORMALIZE, PHOTO], False, "PhotoMetricDistortion behind Normalize"),
        ([LOAD, augmented(NORMALIZE)], True, r"MultiScaleFlipAug\(flip=True\) without RandomFlip"),
        (
            [LOAD, augmented(CROP, FLIP)],
            True,
            "has RandomCrop, after which predictions do not lie on the image",
        ),
        ([LOAD, CROP, augmented(FLIP)], True, "has RandomCrop"),
        ([LOAD, augmented(dict(type="RandomRotate", prob=1.0, degree=10), FLIP)], True, "has RandomRotate"),
        ([LOAD, FLIP, augmented(FLIP)], True, "RandomFlip before MultiScaleFlipAug"),
    ],
)
def test_steps_that_cannot_be_meant_are_an_error(steps, evaluates, words):
    with pytest.raises(ConfigError, match=words):
        check_steps(built(steps), "data.val", evaluates=evaluates)


@pytest.mark.parametrize(
    ("steps", "evaluates", "words"),
    [
        ([LOAD, LABELS, NORMALIZE, NORMALIZE], False, "has Normalize 2 times"),
        ([LOAD, augmented(PHOTO, NORMALIZE, flip=False)], True, "has PhotoMetricDistortion, so that scores"),
    ],
)
def test_steps_that_are_odd_are_said(steps, evaluates, words):
    (said,) = odd_steps(built(steps), "data.val", evaluates=evaluates)
    assert words in said


def test_a_crop_in_training_and_flips_that_never_happen_pass():
    check_steps(built([LOAD, LABELS, CROP]), "data.train", evaluates=False)
    check_steps(built([LOAD, dict(FLIP, prob=0.0), augmented(FLIP)]), "data.val", evaluates=True)


ZERO_STD = dict(NORMALIZE, std=[58.0, 0.0, 57.0])


@pytest.mark.parametrize(
    ("steps", "evaluates"), [([LOAD, LABELS, ZERO_STD], False), ([LOAD, augmented(FLIP, ZERO_STD)], True)]
)
def test_a_std_of_0_is_an_error(steps, evaluates):
    with pytest.raises(ConfigError, match=r"std=\[58\.0, 0\.0, 57\.0\] of Normalize.*data\.val"):
        check_steps(built(steps), "data.val", evaluates=evaluates)


def test_a_std_of_0_ends_an_evaluation_and_a_prediction_before_any_weights_are_read(ade20k, tmp_path):
    cfg = small_experiment(ade20k)
    (normalize,) = [step for step in cfg.data.test.pipeline[1]["transforms"] if step["type"] == "Normalize"]
    normalize["std"] = [58.0, 0.0, 57.0]
    weights = tmp_path / "no_such_weights.pth"
    image = next(ade20k.rglob("*.jpg"))
    for act in (
        lambda: evaluate(cfg, weights),
        lambda: predict_files(cfg, weights, [image], tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"std=\[58\.0, 0\.0, 57\.0\] of Normalize.*data\.test"):
            act()


def test_the_script_test_py_refuses_a_std_of_0_with_code_2(launch, ade20k, tmp_path):
    cfg = small_experiment(ade20k)
    place = [step["type"] for step in cfg.data.test.pipeline[1]["transforms"]].index("Normalize")
    done = launch(
        "launch/test.py",
        TINY,
        tmp_path / "no_such_weights.pth",
        "--cfg-options",
        *data_options(ade20k),
        f"data.test.pipeline.1.transforms.{place}.std=[58.0,0.0,57.0]",
        processes=1,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "std=[58.0, 0.0, 57.0] of Normalize" in done.stderr and "data.test" in done.stderr


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            dict(type="Resize", img_scale=(1.5, 2.5)),
            r"img_scale=\[\(1\.5, 2\.5\)\] of Resize .* whole numbers",
        ),
        (dict(type="Pad", size=(0, 4)), r"size=\(0, 4\) of Pad"),
        (dict(type="Pad", size=(4, 4), pad_val=float("nan")), "pad_val=nan of Pad .* a number"),
        (dict(type="Pad", size=(4, 4), seg_pad_val="x"), "seg_pad_val='x' of Pad .* label"),
        (dict(type="Pad", size=(4, 4), seg_pad_val=[1, 2]), r"seg_pad_val=\[1, 2\] of Pad"),
        (dict(type="RandomCrop", crop_size=(4, 4), cat_max_ratio=-1), "cat_max_ratio=-1 .* above 0"),
        (dict(type="ResizeToMultiple", size_divisor=-1), "size_divisor=-1 of ResizeToMultiple"),
        (dict(NORMALIZE, mean=1.5), "mean=1.5 of Normalize .* one for each channel"),
        (dict(NORMALIZE, std=None), "std=nan of Normalize .* one for each channel"),
        (dict(NORMALIZE, mean=[0.0, float("inf"), 0.0]), "mean=.*inf.* of Normalize"),
    ],
    ids=str,
)
def test_numbers_of_another_kind_are_refused(step, words):
    with pytest.raises(ConfigError, match=words):
        check_steps(built([LOAD, LABELS, step]), "data.train", evaluates=False)
