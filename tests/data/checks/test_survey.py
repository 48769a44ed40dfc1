"""Data sets with one thing wrong each: what the survey says of it, that it says nothing of sound ones, and
that it is quick."""

import os
import re
import time

import cv2
import numpy as np
import pytest
from mmseg.datasets import DATASETS, CustomDataset
from PIL import Image

from internseg_ds.data.checks.normalization import compare_normalization
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.checks.zero_labels import compare_zero_labels
from internseg_ds.data.datasets import build_datasets
from internseg_ds.errors import ConfigError, DataError
from tests.data.test_label_maps import REDUCED, TEST, TRAIN, colours


def entry_of(root, **arguments):
    common = dict(
        type="CustomDataset",
        data_root=str(root),
        img_dir="images",
        ann_dir="labels",
        pipeline=TRAIN,
        classes=["road", "car"],
        palette=colours(2),
    )
    return {**common, **arguments}


def built(root, *, test_mode=False, **arguments):
    entry = entry_of(root, **arguments)
    return build_datasets(entry, "data.train", test_mode=test_mode)


@pytest.fixture
def data(tmp_path):
    """Writes images and label maps of these numbers (a pixel row each), and gives the folder."""

    def write(*rows, ending=".jpg"):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for index, row in enumerate(rows):
            labels = np.tile(np.array(row, np.uint8), (4, 1))
            Image.new("RGB", labels.shape[::-1]).save(tmp_path / f"images/{index}{ending}", format="JPEG")
            Image.fromarray(labels).save(tmp_path / f"labels/{index}.png")
        return tmp_path

    return write


def test_sound_data_are_passed_in_silence(data):
    root = data([0, 1, 255], [1, 1, 0], [0, 0, 1])
    assert (
        survey(built(root), "data.train", training=True)
        == survey(built(root, pipeline=TEST, test_mode=True), "data.val", training=False)
        == []
    )


def test_masks_of_0_and_255_for_two_classes_have_nothing_to_learn(data):
    with pytest.raises(
        DataError,
        match=r"all 2 label maps hold road alone.*0 and 255.*255 is meant to be car",
    ):
        survey(built(data([0, 255], [255, 0])), "data.train", training=True)


def test_a_folder_whose_images_end_otherwise_is_not_called_empty_alone(data):
    root = data([0, 1], [1, 0], ending=".JPG")
    with pytest.raises(
        DataError,
        match=r"data\.train is empty:.*2 files.*\(0\.JPG\).*img_suffix='\.JPG'",
    ):
        built(root)
    with pytest.raises(DataError, match=r"2 files there.*'\.JPG'"):
        built(root, img_suffix=".tif")
    (root / "images/0.JPG").rename(root / "images/0_left.JPG")
    with pytest.raises(DataError, match=r"1 file there.*'_left\.JPG' \(0_left\.JPG\)"):
        built(root, img_suffix="_left.jpg")
    (root / "images/0_left.JPG").rename(root / "images/0.JPG")
    first, second = entry_of(root, img_suffix=".JPG"), entry_of(root)
    with pytest.raises(
        DataError,
        match=r"images has no image.*2 files.*'\.JPG'",
    ):
        build_datasets([first, second], "data.train")
    assert len(built(root, img_suffix=".JPG")) == 2


def test_label_maps_that_end_otherwise_are_named(data):
    root = data([0, 1], [1, 0])
    with pytest.raises(DataError, match=r"2 of 2 label maps.*0\.PNG.*0\.png"):
        built(root, seg_map_suffix=".PNG")
    (root / "split.txt").write_text("0\n1\n")
    with pytest.raises(DataError, match=r"split file .*0\.jpeg.*0\.jpg"):
        built(root, img_suffix=".jpeg", split="split.txt")


@pytest.mark.parametrize("validates", [False, True])
def test_a_palette_that_opencv_would_read_as_colours_is_told_how_to_be_read(data, validates):
    root = data([0, 1], [1, 0])
    for path in (root / "labels").iterdir():
        labels = Image.open(path)
        labels.putpalette([0, 0, 0, 200, 10, 10])
        labels.save(path)
    by_opencv = (
        dict(pipeline=TEST, gt_seg_map_loader_cfg=dict(imdecode_backend="cv2"), test_mode=True)
        if validates
        else dict(pipeline=[TRAIN[0], dict(type="LoadAnnotations", imdecode_backend="cv2"), *TRAIN[2:]])
    )
    with pytest.raises(
        ConfigError,
        match=r"0\.png.*palette.*imdecode_backend='cv2'",
    ):
        built(root, **by_opencv)
    assert survey(built(root), "data.train", training=True) == []
    built(data([0, 1], [1, 0]), **by_opencv)  # without a palette


def test_classes_that_never_occur_are_named(data):
    dataset = built(data([0, 1], [1, 0]), classes=list("abcd"), palette=colours(4))
    (said,) = survey(dataset, "data.train", training=True)
    assert "2 of 4 classes" in said and said.endswith(": c, d")


def test_a_large_data_set_is_looked_at_in_part_and_quickly(data):
    rows = [[0, 1]] * 3
    dataset = built(data(*rows), classes=list("abc"), palette=colours(3))
    dataset.img_infos = dataset.img_infos * 10_000
    began = time.monotonic()
    (said,) = survey(dataset, "data.train", training=True)
    assert "1 of 3 classes" in said and "200 (of 30,000) label maps" in said and time.monotonic() - began < 5


def test_numbers_of_no_class_in_a_validation_set_are_said_before_they_count_as_wrong(data):
    (said,) = survey(
        built(data([0, 1, 7], [0, 1, 1]), pipeline=TEST, test_mode=True), "data.val", training=False
    )
    assert re.search(r"2 label maps.*, 1 holds", said) and "7 in " in said and "labels/0.png" in said


def test_images_left_out_for_their_suffix_although_labelled_are_an_error(data):
    root = data([0, 1], [1, 0])
    (root / "images/1.jpg").rename(root / "images/1.JPG")
    words = (
        r"1 file of .*images is left out, for the ending is \.JPG and not "
        r"img_suffix='\.jpg' \(1\.JPG\); 1 is taken"
    )
    with pytest.raises(DataError, match=words):
        survey(built(root), "data.train", training=True)


def test_images_left_out_without_label_maps_are_a_warning(data):
    root = data([0, 1], [1, 0])
    (root / "images/other.jpeg").write_bytes(b"")
    (said,) = survey(built(root), "data.train", training=True)
    assert "1 file of" in said and "other.jpeg" in said


def test_a_subset_is_no_image_left_out(data):
    dataset = built(data([0, 1], [1, 0], [1, 0]))
    dataset.img_infos = dataset.img_infos[:2]
    assert survey(dataset, "data.train", training=True) == []


def test_an_image_turned_by_180_degrees_is_said(data):
    root = data([0, 1], [1, 0])
    picture = Image.new("RGB", (2, 4))
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(root / "images/1.jpg", exif=exif)
    (said,) = survey(built(root), "data.train", training=True)
    assert "EXIF turns it by 180 degrees" in said and "images/1.jpg (1 such images of 2 looked at)" in said
    assert (
        survey(
            built(root, pipeline=[dict(TRAIN[0], color_type="color_ignore_orientation"), *TRAIN[1:]]),
            "data.train",
            training=True,
        )
        == []
    )


def test_label_maps_of_other_sides_than_their_images_are_an_error_or_said(data):
    root = data([0, 1, 0], [1, 0, 1])
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(root / "labels/1.png")
    with pytest.raises(
        DataError,
        match=r"all 2 label maps.*1\.png has 2 x 3.*4 x 3",
    ):
        survey(built(root), "data.train", training=True)
    (said,) = survey(built(root), "data.train", training=True, tolerated=1)
    assert "1.png has 2 x 3 pixels and its image 4 x 3" in said
    (said,) = survey(built(root, pipeline=TEST, test_mode=True), "data.val", training=False)
    assert "those images are left out" in said


def test_sixteen_bits_and_four_channels_are_said(data):
    root = data([0, 1], [1, 0])
    cv2.imwrite(str(root / "images/0.png"), np.zeros((4, 2, 4), np.uint16))
    cv2.imwrite(str(root / "images/1.png"), np.zeros((4, 2, 4), np.uint16))
    (said,) = [said for said in survey(built(root, img_suffix=".png"), "data.train", training=True)]
    assert re.search(r"4 channels of uint16.* 3 of uint8", said)


@pytest.mark.parametrize(("pipeline", "scored"), [(REDUCED, False), (TRAIN, True)])
def test_zero_reduced_on_one_side_only_is_an_error(data, pipeline, scored):
    root = data([0, 1, 2], [1, 2, 0])
    val = built(root, pipeline=TEST, test_mode=True, reduce_zero_label=scored)
    with pytest.raises(
        ConfigError,
        match=f"={not scored} of LoadAnnotations.*={scored} of data.val",
    ):
        compare_zero_labels([entry_of(root, pipeline=pipeline)], val, "data.val")


@pytest.mark.parametrize(("pipeline", "scored"), [(REDUCED, True), (TRAIN, False)])
def test_zero_reduced_on_both_sides_or_none_is_right(data, pipeline, scored):
    root = data([0, 1, 2], [1, 2, 0])
    val = built(root, pipeline=TEST, test_mode=True, reduce_zero_label=scored)
    # that of a training set has no effect
    trained = [
        entry_of(root, pipeline=pipeline),
        entry_of(root, pipeline=pipeline, reduce_zero_label=not scored),
    ]
    assert compare_zero_labels(trained, val, "data.val") == []


def test_two_kinds_of_data_set_may_differ_in_it(data):
    @DATASETS.register_module(force=True)
    class OtherKind(CustomDataset):
        pass

    root = data([0, 1, 2], [1, 2, 0])
    (said,) = compare_zero_labels(
        [entry_of(root, pipeline=REDUCED)],
        built(root, type="OtherKind", pipeline=TEST, test_mode=True),
        "data.val",
    )
    assert "OtherKind" in said


@pytest.mark.parametrize("text", ["0\n1\n", "\ufeff0\n1\n", "0\n\n1\n\n", "0\r\n1"])
def test_empty_lines_and_a_byte_order_mark_of_a_split_file_are_no_images(data, text):
    root = data([0, 1], [1, 0], [1, 0])
    (root / "some.txt").write_bytes(text.encode())
    assert [info["filename"] for info in built(root, split="some.txt").img_infos] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "0\n7\n",
            r"1 of 2 images of the split file .*some\.txt is missing, the first is .*images/7\.jpg; put",
        ),
        ("0.jpg\n1.jpg", r"2 of 2 images .*the first is .*0\.jpg\.jpg; its lines end in \.jpg already"),
    ],
)
def test_a_split_file_that_names_missing_images_is_found_up_front(data, text, words):
    root = data([0, 1], [1, 0])
    (root / "some.txt").write_text(text)
    with pytest.raises(DataError, match=words):
        built(root, split="some.txt")


def test_lossy_label_maps_are_said(data):
    root = data([0, 1], [1, 0])
    for index in range(2):
        Image.open(root / f"labels/{index}.png").save(root / f"labels/{index}.jpg", quality=100)
    assert any(
        "label maps end in .jpg" in said
        for said in survey(built(root, seg_map_suffix=".jpg"), "data.train", training=True)
    )


def test_a_square_image_turned_by_90_degrees_is_said(data):
    root = data([0, 1, 0, 1], [1, 0, 0, 1])
    picture = Image.new("RGB", (4, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(root / "images/1.jpg", exif=exif)
    (said,) = survey(built(root), "data.train", training=True)
    assert "EXIF turns it by 90 degrees" in said


def test_a_pipe_among_the_images_is_not_waited_for(data):
    root = data([0, 1], [1, 0])
    dataset = built(root)
    (root / "images/1.jpg").unlink()
    os.mkfifo(root / "images/1.jpg")
    assert survey(dataset, "data.train", training=True) == []


def test_a_step_that_turns_images_before_their_label_maps_are_loaded_is_refused(data):
    pipeline = [TRAIN[0], dict(type="RandomFlip", prob=0.5), *TRAIN[1:]]
    with pytest.raises(ConfigError, match="RandomFlip before LoadAnnotations"):
        built(data([0, 1]), pipeline=pipeline)


def test_an_evaluation_normalises_as_the_training_does(data):
    root = data([0, 1])

    def normalized(to_rgb):
        step = dict(
            type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=to_rgb
        )
        load, augment = TEST
        return (
            built(root, pipeline=[*TRAIN[:2], step, *TRAIN[2:]]),
            built(
                root,
                pipeline=[load, {**augment, "transforms": [step, *augment["transforms"]]}],
                test_mode=True,
            ),
        )

    train, val = normalized(to_rgb=True)
    assert (
        compare_normalization(train, val)
        == compare_normalization(built(root), built(root, pipeline=TEST, test_mode=True))
        == []
    )
    (said,) = compare_normalization(train, normalized(to_rgb=False)[1])
    settings = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=False"
    assert re.search(rf"data\.val.* {re.escape(settings)}, .*data\.train", said)
    (said,) = compare_normalization(train, built(root, pipeline=TEST, test_mode=True))
    assert "data.val are normalised by no Normalize" in said
