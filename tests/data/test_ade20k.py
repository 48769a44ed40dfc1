"""The few-shot subset: the same on every rank and in every restart."""

from itertools import pairwise
from pathlib import Path

import pytest
from mmseg.datasets import build_dataset

from internseg_ds.data.ade20k import ADE20KDataset
from internseg_ds.errors import ConfigError


def folder_of(images: Path, names: list[str]) -> Path:
    images.mkdir()
    for name in names:
        (images / f"{name}.jpg").touch()
    return images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "images", [f"ADE_train_{k:08d}" for k in range(1, 31)])


def names(images: Path, **arguments: object) -> list[str]:
    return [
        info["filename"] for info in ADE20KDataset(pipeline=[], img_dir=str(images), **arguments).img_infos
    ]


def test_without_max_image_num_all_images_come_in_the_order_of_their_names(images):
    assert names(images) == [f"ADE_train_{k:08d}.jpg" for k in range(1, 31)]


def test_a_subset_has_the_asked_size_distinct_images_and_the_order_of_their_names(images):
    subset = names(images, max_image_num=7)
    assert len(set(subset)) == 7
    assert subset == sorted(subset)
    assert subset != names(images)[:7]  # drawn, not cut off


def test_the_draw_of_seed_zero_is_the_one_of_all_earlier_runs(images):
    drawn = names(images, max_image_num=3)
    assert drawn == ["ADE_train_00000002.jpg", "ADE_train_00000004.jpg", "ADE_train_00000010.jpg"]


def test_the_same_seed_draws_the_same_subset_and_another_seed_another(images):
    assert names(images, max_image_num=10, subset_seed=4) == names(images, max_image_num=10, subset_seed=4)
    assert names(images, max_image_num=10, subset_seed=4) != names(images, max_image_num=10, subset_seed=5)


@pytest.mark.parametrize("subset_seed", [0, 1])
def test_a_smaller_subset_lies_inside_every_bigger_one(images, subset_seed):
    subsets = [set(names(images, max_image_num=n, subset_seed=subset_seed)) for n in range(1, 31)]
    assert all(smaller < bigger for smaller, bigger in pairwise(subsets))


def test_a_subset_is_never_more_than_there_is(images):
    assert names(images, max_image_num=20210 // 16) == names(images)


def test_the_subset_does_not_depend_on_the_order_of_the_file_list(tmp_path, images):
    stems = [name.removesuffix(".jpg") for name in names(images)]
    (tmp_path / "backwards.txt").write_text("\n".join(reversed(stems)))
    assert names(images, max_image_num=8, split=str(tmp_path / "backwards.txt")) == names(
        images, max_image_num=8
    )


def test_every_image_is_drawn_about_equally_often_over_many_seeds(images):
    drawn = [name for seed in range(300) for name in names(images, max_image_num=10, subset_seed=seed)]
    counts = [drawn.count(name) for name in names(images)]
    assert min(counts) > 65 and max(counts) < 135  # 100 expected, deviation 8


def test_a_published_config_that_names_ade20kdataset_builds_this_one(images):
    dataset = build_dataset(
        dict(type="ADE20KDataset", img_dir=str(images), max_image_num=20210 // 2, pipeline=[])
    )
    assert type(dataset) is ADE20KDataset
    assert dataset.reduce_zero_label and len(dataset.CLASSES) == 150


def test_a_subset_of_no_images_is_an_error(images):
    with pytest.raises(ConfigError, match="max_image_num=0"):
        names(images, max_image_num=0)
