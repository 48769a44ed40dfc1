"""Data sets of InternImage's configs, against InternImage's own numbers."""

import numpy as np
import pytest
from mmseg.datasets import CityscapesDataset
from PIL import Image

from internseg_ds.data.checks.survey import survey
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.published import MapillaryDataset, MapillaryHack, NYUDepthV2Dataset
from internseg_ds.data.samples import sample
from tests.data.test_label_maps import REDUCED, TRAIN

THEIRS = [
    [13, 24, 41],
    [2, 15],
    [17],
    [6],
    [3],
    [45, 47],
    [48],
    [50],
    [30],
    [29],
    [27],
    [19],
    [20, 21, 22],
    [55],
    [61],
    [54],
    [58],
    [57],
    [52],
]
"""Numbers of Mapillary's classes by the number of Cityscapes', as InternImage's code has them."""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "i").mkdir(), (tmp_path / "l").mkdir()
    return tmp_path


def test_mapillarys_labels_become_those_of_cityscapes(root):
    labels = np.arange(66, dtype=np.uint8).reshape(6, 11)
    Image.new("RGB", (11, 6)).save(root / "i/a.jpg")
    Image.fromarray(labels).save(root / "l/a.png")
    entry = dict(
        type="MapillaryDataset",
        data_root=str(root),
        img_dir="i",
        ann_dir="l",
        pipeline=[*TRAIN[:2], dict(type="MapillaryHack"), *TRAIN[2:]],
    )
    dataset = build_datasets(entry, "data.train")
    found = sample(dataset, 0)["gt_semantic_seg"].data[0].flatten().tolist()
    assert found == [
        next((ours for ours, some in enumerate(THEIRS) if label in some), 255) for label in range(66)
    ]
    assert dataset.CLASSES == CityscapesDataset.CLASSES and len(dataset.PALETTE) == 19
    assert survey(dataset, "data.train", training=True) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda entry: dict(entry, img_dir=["i", "i"], ann_dir=["l", "l"]),
        lambda entry: [entry, entry],
        lambda entry: dict(type="RepeatDataset", times=2, dataset=entry),
    ],
)
def test_the_classes_of_the_relabelling_are_those_of_wrappers_too(root, wrap):
    Image.new("RGB", (1, 1)).save(root / "i/a.jpg")
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(root / "l/a.png")
    entry = dict(
        type="MapillaryDataset",
        data_root=str(root),
        img_dir="i",
        ann_dir="l",
        pipeline=[*TRAIN[:2], dict(type="MapillaryHack"), *TRAIN[2:]],
    )
    dataset = build_datasets(wrap(entry), "data.train")
    assert len(dataset) == 2 and dataset.CLASSES == CityscapesDataset.CLASSES and len(dataset.PALETTE) == 19


def test_without_the_relabelling_mapillary_has_its_66_classes(root):
    assert (
        len(MapillaryDataset.CLASSES) == len(MapillaryDataset.PALETTE) == 66
        and MapillaryHack.CLASSES == CityscapesDataset.CLASSES
    )


def test_nyu_depth_takes_one_from_its_labels(root):
    Image.new("RGB", (3, 1)).save(root / "i/5.png")
    Image.fromarray(np.array([[0, 1, 40]], np.uint8)).save(root / "l/5.png")
    (root / "train.txt").write_text("5\n")
    entry = dict(
        type="NYUDepthV2Dataset",
        data_root=str(root),
        img_dir="i",
        ann_dir="l",
        split="train.txt",
        pipeline=REDUCED,
    )
    dataset = build_datasets(entry, "data.train")
    assert sample(dataset, 0)["gt_semantic_seg"].data[0].tolist() == [[255, 0, 39]]
    assert len(NYUDepthV2Dataset.CLASSES) == len(
        NYUDepthV2Dataset.PALETTE
    ) == 40 and NYUDepthV2Dataset.PALETTE[-1] == [255, 194, 7]
