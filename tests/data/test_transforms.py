"""The transforms of published configs that mmseg lacks, against sizes worked out by hand."""

import numpy as np
import pytest
from mmcv.parallel import DataContainer
from mmseg.datasets.builder import PIPELINES
from mmseg.datasets.pipelines import Compose

import internseg_ds.data.transforms  # noqa: F401 - registers
from internseg_ds.errors import ConfigError

SETR = dict(type="SETR_Resize", keep_ratio=True, crop_size=(504, 504), setr_multi_scale=True)


def picture(height: int, width: int, **more: object) -> dict:
    return {"img": np.zeros((height, width, 3), np.uint8), **more}


@pytest.mark.parametrize(
    "height, width, scale, expected",
    [
        (300, 400, (2016, 504), (504, 672)),  # 400 * 504 / 300
        (400, 300, (2016, 504), (672, 504)),
        (504, 504, (2016, 504), (504, 504)),
        (300, 400, (1008, 252), (504, 672)),  # never below the window
        (300, 400, (2419, 605), (605, 807)),  # 806.67: above the window the scale counts
        (100, 900, (2016, 504), (504, 4536)),  # mmseg's Resize would stop at 224 x 2016
        (683, 1024, (504, 2016), (504, 756)),  # 755.63; the scale's order does not matter
    ],
)
def test_setr_resize_makes_the_short_side_the_scales_but_at_least_the_crop(height, width, scale, expected):
    results = PIPELINES.build(SETR)(picture(height, width, scale=scale))
    assert results["img"].shape == results["img_shape"] == results["pad_shape"] == (*expected, 3)
    ratios = [expected[1] / width, expected[0] / height]
    np.testing.assert_array_equal(results["scale_factor"], np.float32(ratios * 2))
    assert results["keep_ratio"] is True


def test_setr_resize_brings_labels_to_the_images_size_without_new_values():
    labels = np.random.default_rng(0).choice(np.uint8([0, 7, 255]), (300, 400))
    results = PIPELINES.build(SETR)(
        picture(300, 400, scale=(2016, 504), gt_semantic_seg=labels, seg_fields=["gt_semantic_seg"])
    )
    assert results["gt_semantic_seg"].shape == (504, 672)
    assert set(np.unique(results["gt_semantic_seg"])) == {0, 7, 255}


def test_without_setr_multi_scale_it_is_mmsegs_resize():
    results = PIPELINES.build(dict(type="SETR_Resize", crop_size=(504, 504)))(
        picture(100, 900, scale=(2016, 504))
    )
    assert results["img"].shape == (224, 2016, 3)


def test_setr_resize_takes_the_arguments_of_resize():
    results = PIPELINES.build(dict(SETR, img_scale=(2016, 504), ratio_range=(1.5, 1.5)))(picture(300, 400))
    assert results["img"].shape == (756, 1008, 3)


def test_setr_resize_without_a_crop_size_is_a_config_error():
    with pytest.raises(ConfigError, match="crop_size"):
        PIPELINES.build(dict(type="SETR_Resize", setr_multi_scale=True))


@pytest.mark.parametrize(
    "height, width, expected", [(300, 400, (504, 672)), (336, 500, (504, 756)), (683, 1000, (504, 742))]
)
def test_the_published_test_pipeline_gives_sizes_that_14_divides(height, width, expected):
    # 504 x 750 -> 756 (54 x 14); 504 x 738 -> 742 (53 x 14): ResizeToMultiple goes up
    pipeline = Compose([dict(
        type="MultiScaleFlipAug", img_scale=(2016, 504), flip=False,
        transforms=[
            SETR,
            dict(type="ResizeToMultiple", size_divisor=14),
            dict(type="RandomFlip"),
            dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
            dict(type="ImageToTensor", keys=["img"]),
            dict(type="Collect", keys=["img"]),
        ])])  # fmt: skip
    info = dict(filename="a.jpg", ori_filename="a.jpg", ori_shape=(height, width, 3))
    results = pipeline(picture(height, width, img_norm_cfg={}, **info))
    assert results["img"][0].shape == (3, *expected)
    assert results["img_metas"][0].data["ori_shape"] == (height, width, 3)


def test_to_mask_gives_one_mask_for_each_class_but_the_ignored():
    labels = np.uint8([[3, 3, 255], [0, 149, 3]])
    results = PIPELINES.build(dict(type="ToMask"))({"gt_semantic_seg": labels})
    assert results["gt_labels"].data.tolist() == [0, 3, 149]
    assert results["gt_masks"].data.tolist() == [
        [[0, 0, 0], [1, 0, 0]],
        [[1, 1, 0], [0, 0, 1]],
        [[0, 0, 0], [0, 1, 0]],
    ]


def test_to_mask_of_an_unlabelled_image_is_empty_but_keeps_its_size():
    results = PIPELINES.build(dict(type="ToMask"))({"gt_semantic_seg": np.full((4, 6), 255, np.uint8)})
    assert results["gt_labels"].data.shape == (0,)
    assert results["gt_masks"].data.shape == (0, 4, 6)


def test_the_published_end_of_a_mask_pipeline_collects_the_masks():
    pipeline = Compose([
        dict(type="ToMask"),
        dict(type="DefaultFormatBundle"),
        dict(type="Collect", keys=["img", "gt_semantic_seg", "gt_masks", "gt_labels"], meta_keys=()),
    ])  # fmt: skip
    results = pipeline(picture(4, 6, gt_semantic_seg=np.zeros((4, 6), np.uint8)))
    assert isinstance(results["gt_masks"], DataContainer) and not results["gt_masks"].stack
    assert results["gt_masks"].data.shape == (1, 4, 6)
    assert results["gt_semantic_seg"].data.shape == (1, 4, 6)
