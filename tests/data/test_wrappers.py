"""Data sets inside data sets, as configs name them."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.samples import sample
from internseg_ds.errors import ConfigError, DataError
from tests.data.test_label_maps import TRAIN, colours


@pytest.fixture
def folder(tmp_path):
    """make(name, labels of each image): a folder of single-coloured label maps, and its config entry."""

    def make(name, *labels):
        for index, label in enumerate(labels):
            for kind in ("images", "labels"):
                (tmp_path / name / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 2), (index, 0, 0)).save(tmp_path / name / f"images/{index:02d}.png")
            Image.fromarray(np.full((2, 3), label, np.uint8)).save(
                tmp_path / name / f"labels/{index:02d}.png"
            )
        return dict(
            type="CustomDataset",
            data_root=str(tmp_path / name),
            img_dir="images",
            ann_dir="labels",
            img_suffix=".png",
            pipeline=TRAIN,
            classes=list("abc"),
            palette=colours(3),
        )

    return make


def built(entry):
    return build_datasets(entry, "data.train")


def test_a_concat_dataset_of_a_config_is_its_parts_one_after_the_other(folder):
    first, second = folder("first", 0, 1), folder("second", 2)
    joined = built(dict(type="ConcatDataset", datasets=[first, second]))
    assert [sample(joined, index)["gt_semantic_seg"].data.unique().tolist() for index in range(3)] == [
        [0],
        [1],
        [2],
    ]
    inner = dict(type="ConcatDataset", datasets=[first, dict(type="RepeatDataset", times=2, dataset=second)])
    repeated = built(dict(type="RepeatDataset", times=2, dataset=inner))
    assert len(repeated) == 8


def test_a_rare_class_stands_more_often_as_lvis_counts(folder):
    balanced = built(
        dict(type="ClassBalancedDataset", oversample_thr=0.5, dataset=folder("some", *[0] * 9, 1, 255))
    )
    # class 0 in 9 of 11 images: once; class 1 in 1 of 11: sqrt(0.5 * 11) = 2.35, so 3 times; no class: once
    assert Counter(balanced.indices) == {**dict.fromkeys(range(9), 1), 9: 3, 10: 1} and len(balanced) == 13
    assert sample(balanced, 11)["gt_semantic_seg"].data.unique().tolist() == [1]
    empty_counted = built(
        dict(
            type="ClassBalancedDataset",
            oversample_thr=0.5,
            filter_empty_gt=False,
            dataset=folder("some", *[0] * 9, 1, 255),
        )
    )
    assert Counter(empty_counted.indices)[10] == 3


def test_a_damaged_image_is_named_inside_a_balanced_set(folder, tmp_path):
    balanced = built(dict(type="ClassBalancedDataset", oversample_thr=1.0, dataset=folder("some", 0, 1)))
    (tmp_path / "some/images/01.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/01\.png is no picture"):
        sample(balanced, len(balanced) - 1)


@pytest.mark.parametrize("threshold", [0, 2, True, "x"])
def test_a_threshold_that_is_no_share_is_refused(folder, threshold):
    with pytest.raises((ConfigError, DataError), match="oversample_thr"):
        built(dict(type="ClassBalancedDataset", oversample_thr=threshold, dataset=folder("some", 0, 1)))


def test_cityscapes_in_several_folders_is_trained_on(folder):
    first, second = folder("first", 0, 1), folder("second", 2)
    root = str(Path(first["data_root"]).parent)
    entry = dict(
        type="CityscapesDataset",
        data_root=root,
        img_dir=["first/images", "second/images"],
        ann_dir=["first/labels", "second/labels"],
        img_suffix=".png",
        seg_map_suffix=".png",
        pipeline=TRAIN,
    )
    joined = built(entry)
    assert [sample(joined, index)["gt_semantic_seg"].data.unique().tolist() for index in range(3)] == [
        [0],
        [1],
        [2],
    ]
    assert (
        len(joined.CLASSES) == 19
        and len(built([entry, second | dict(classes=joined.CLASSES, palette=joined.PALETTE)])) == 4
    )
    (Path(root) / "all.txt").write_text("00\n")
    one = entry | dict(img_dir="first/images", ann_dir="first/labels", split=[f"{root}/all.txt"] * 3)
    assert len(built(one)) == 3 and len(built([one | dict(split=f"{root}/all.txt")])) == 1


@pytest.mark.parametrize(
    "folders",
    [dict(img_dir=["images"] * 2), dict(img_dir=["images"] * 2, ann_dir=["labels"] * 3), dict(img_dir=[])],
)
def test_folders_that_cannot_be_paired_are_refused(folder, folders):
    with pytest.raises(
        ConfigError,
        match=f"data.train has {len(folders['img_dir'])} img_dir,.*ann_dir",
    ):
        built(folder("some", 0) | folders)


@pytest.mark.parametrize("times", [0, -1, 1.5, True, "2", None, [2]], ids=repr)
def test_a_data_set_that_is_repeated_no_whole_number_of_times_is_an_error(times, folder):
    entry = dict(
        type="ConcatDataset",
        datasets=[folder("first", 0), dict(type="RepeatDataset", times=times, dataset=folder("second", 1))],
    )
    with pytest.raises(
        DataError, match=rf"repeats.* times={re.escape(repr(times))}, .* set times to 1 or more"
    ):
        built(entry)


def test_an_ending_that_stands_in_a_folders_name_is_replaced_at_the_end_alone(folder):
    entry = folder("first", 0, 1)
    root = Path(entry["data_root"])
    for kind, ending in (("images", ".png"), ("labels", ".bmp")):
        inner = root / kind / "of.pngs"
        inner.mkdir()
        for file in sorted((root / kind).glob("*.png")):
            Image.open(file).save(inner / f"{file.stem}{ending}")
            file.unlink()
    assert [
        sample(built(entry | dict(seg_map_suffix=".bmp")), index)["gt_semantic_seg"].data.unique().tolist()
        for index in range(2)
    ] == [[0], [1]]


def test_a_file_of_classes_may_have_empty_lines_and_a_byte_order_mark(folder, tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n\r\nc\n\n")
    assert list(built(folder("first", 0) | dict(classes=str(tmp_path / "names.txt"))).CLASSES) == [
        "a",
        "b",
        "c",
    ]
    with pytest.raises(DataError, match=r"classes='.*nowhere.txt' names a file"):
        built(folder("second", 0) | dict(classes=str(tmp_path / "nowhere.txt")))


@pytest.mark.parametrize("label", ["x", None, 1.5, [1, 2]], ids=repr)
def test_a_label_to_ignore_that_is_no_whole_number_is_an_error(label, folder):
    with pytest.raises(
        DataError, match=rf"data\.train\.ignore_index={re.escape(repr(label))} must be a whole"
    ):
        built(folder("first", 0) | dict(ignore_index=label))
