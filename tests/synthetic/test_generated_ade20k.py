"""The generated data set: the same for everyone, learnable by everyone, and never written over somebody's
files."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset as MMSegADE20K

from internseg_ds.data.ade20k import ADE20KDataset
from internseg_ds.errors import ConfigError, DataError
from internseg_ds.synthetic.canvas import CLASS_IDS, UNLABELLED
from internseg_ds.synthetic.generated_ade20k import main, write_generated_ade20k
from internseg_ds.synthetic.scenes import draw_scene

SMALL = {"training": 3, "validation": 2, "size": 48}
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import mmseg for seconds


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_scene(np.random.default_rng((11, k)), 96) for k in range(80)]


def test_the_ids_are_those_of_the_classes_names_in_mmseg():
    assert {name: MMSegADE20K.CLASSES.index(name) + 1 for name in CLASS_IDS} == CLASS_IDS


def test_image_and_labels_of_a_scene_agree_in_size_and_are_bytes(scenes):
    for image, labels in scenes:
        assert image.shape == (*labels.shape, 3)
        assert image.dtype == labels.dtype == np.uint8


def test_labels_are_only_the_stated_ids(scenes):
    assert {int(value) for _, labels in scenes for value in np.unique(labels)} == {
        UNLABELLED,
        *CLASS_IDS.values(),
    }


def test_every_class_is_in_at_least_a_tenth_of_the_images_and_covers_a_hundredth_of_all_pixels(scenes):
    every_pixel = np.concatenate([labels.ravel() for _, labels in scenes])
    for name, class_id in CLASS_IDS.items():
        assert np.mean([(labels == class_id).any() for _, labels in scenes]) >= 0.1, name
        assert (every_pixel == class_id).mean() >= 0.01, name


def test_a_little_of_the_pixels_is_unlabelled(scenes):
    assert 0.002 < np.concatenate([labels.ravel() for _, labels in scenes]).__eq__(UNLABELLED).mean() < 0.05


def test_short_sides_and_aspects_vary_within_the_stated_range(scenes):
    shapes = np.array([labels.shape for _, labels in scenes])
    short, aspect = shapes.min(axis=1), shapes[:, 1] / shapes[:, 0]
    assert 0.87 * 96 < short.min() < 96 < short.max() < 1.26 * 96
    assert 0.73 < aspect.min() < 0.9 and 1.4 < aspect.max() < 1.62


def test_colour_alone_tells_sky_from_road_on_average(scenes):
    sky, road = (
        np.concatenate([image[labels == CLASS_IDS[name]] for image, labels in scenes]).mean()
        for name in ("sky", "road")
    )
    assert sky > road + 40  # pictures and labels belong to each other


def test_the_folder_holds_the_layout_of_ade20k_and_mmseg_reads_it(tmp_path):
    write_generated_ade20k(tmp_path / "ade", **SMALL)
    assert sorted(contents(tmp_path / "ade")) == [
        "GENERATED.json",
        "annotations/training/ADE_train_00000001.png",
        "annotations/training/ADE_train_00000002.png",
        "annotations/training/ADE_train_00000003.png",
        "annotations/validation/ADE_val_00000001.png",
        "annotations/validation/ADE_val_00000002.png",
        "images/training/ADE_train_00000001.jpg",
        "images/training/ADE_train_00000002.jpg",
        "images/training/ADE_train_00000003.jpg",
        "images/validation/ADE_val_00000001.jpg",
        "images/validation/ADE_val_00000002.jpg",
    ]
    crop_size = (56, 56)  # the published train pipeline, smaller
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="Resize", img_scale=(224, 56), ratio_range=(0.5, 2.0)),
        dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="Normalize", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
        dict(type="Pad", size=crop_size, pad_val=0, seg_pad_val=255),
        dict(type="DefaultFormatBundle"),
        dict(type="Collect", keys=["img", "gt_semantic_seg"]),
    ]
    dataset = ADE20KDataset(
        pipeline=pipeline,
        data_root=str(tmp_path / "ade"),
        img_dir="images/training",
        ann_dir="annotations/training",
    )
    assert len(dataset) == 3
    for sample in dataset:
        assert sample["img"].data.shape == (3, *crop_size)
        assert set(sample["gt_semantic_seg"].data.unique().tolist()) <= {
            class_id - 1 for class_id in CLASS_IDS.values()
        } | {255}


def test_annotations_are_one_channel_pngs_of_the_images_size(tmp_path):
    write_generated_ade20k(tmp_path / "ade", **SMALL)
    image = cv2.imread(str(tmp_path / "ade/images/validation/ADE_val_00000002.jpg"))
    labels = cv2.imread(
        str(tmp_path / "ade/annotations/validation/ADE_val_00000002.png"), cv2.IMREAD_UNCHANGED
    )
    assert labels.shape == image.shape[:2]
    assert set(np.unique(labels)) <= {UNLABELLED, *CLASS_IDS.values()}


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_images(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_generated_ade20k(tmp_path / name, seed=seed, **SMALL)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert not any(a[name] == c[name] for name in a)


def test_an_image_does_not_depend_on_how_many_others_are_made_and_splits_differ(tmp_path):
    write_generated_ade20k(tmp_path / "few", training=2, validation=2, size=48)
    write_generated_ade20k(tmp_path / "more", training=4, validation=1, size=48)
    few, more = contents(tmp_path / "few"), contents(tmp_path / "more")
    shared = (few.keys() & more.keys()) - {"GENERATED.json"}
    assert len(shared) == 6 and all(few[name] == more[name] for name in shared)
    assert few["images/training/ADE_train_00000001.jpg"] != few["images/validation/ADE_val_00000001.jpg"]


def test_a_finished_data_set_is_left_as_it_is_and_mended_when_a_file_is_lost(tmp_path):
    root = tmp_path / "ade"
    write_generated_ade20k(root, **SMALL)
    before, inode = contents(root), root.stat().st_ino
    write_generated_ade20k(root, **SMALL)
    assert root.stat().st_ino == inode  # the very folder, not a new one
    (root / "annotations/training/ADE_train_00000002.png").unlink()
    write_generated_ade20k(root, **SMALL)
    assert contents(root) == before


def test_other_parameters_replace_a_generated_data_set_and_leave_nothing_beside_it(tmp_path):
    write_generated_ade20k(tmp_path / "ade", **SMALL)
    write_generated_ade20k(tmp_path / "ade", training=1, validation=1, size=48)
    assert len(contents(tmp_path / "ade")) == 5
    assert json.loads((tmp_path / "ade/GENERATED.json").read_text())["training"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ade"]


@pytest.mark.parametrize("generated_first", [False, True])
def test_a_folder_with_a_foreign_file_is_refused_and_untouched(tmp_path, generated_first):
    root = tmp_path / "ade"
    if generated_first:
        write_generated_ade20k(root, **SMALL)
    foreign = root / "images/training/ADE_train_00020210.jpg"
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_bytes(b"a real photograph")
    before = contents(root)
    with pytest.raises(DataError, match=r"\(1, such as images/training/ADE_train_00020210\.jpg\)"):
        write_generated_ade20k(root, training=2, validation=2, size=48)
    assert contents(root) == before


def test_a_folder_of_links_to_a_real_data_set_is_refused_and_untouched(tmp_path):
    (tmp_path / "real/images/training").mkdir(parents=True)
    (tmp_path / "real/images/training/ADE_train_00000001.jpg").write_bytes(b"a real photograph")
    (tmp_path / "ade").mkdir()
    (tmp_path / "ade/images").symlink_to(tmp_path / "real/images")
    with pytest.raises(DataError, match="such as images"):
        write_generated_ade20k(tmp_path / "ade", **SMALL)
    assert (tmp_path / "ade/images/training/ADE_train_00000001.jpg").read_bytes() == b"a real photograph"


def test_a_link_to_the_folder_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "ade").symlink_to(tmp_path / "disk")
    write_generated_ade20k(tmp_path / "ade", **SMALL)
    assert (tmp_path / "ade").is_symlink()
    assert len(contents(tmp_path / "disk")) == 11


def test_a_damaged_marker_protects_the_files_beside_it(tmp_path):
    write_generated_ade20k(tmp_path / "ade", **SMALL)
    (tmp_path / "ade/GENERATED.json").write_text("{")
    with pytest.raises(DataError, match=r"not generated here \(11, "):
        write_generated_ade20k(tmp_path / "ade", **SMALL)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "ade").write_text("")
    with pytest.raises(DataError, match="not a folder"):
        write_generated_ade20k(tmp_path / "ade", **SMALL)


@pytest.mark.parametrize("had_one", [False, True])
def test_an_interrupted_run_leaves_what_was_there_and_nothing_half_written(tmp_path, had_one):
    if had_one:
        write_generated_ade20k(tmp_path / "ade", **SMALL)
    before = contents(tmp_path)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a job in the background ignores
    writer = FORK.Process(target=write_generated_ade20k, args=(tmp_path / "ade", 5000, 1), daemon=True)
    writer.start()
    signal.signal(signal.SIGINT, handler)
    wait_until(lambda: len(list(tmp_path.glob(".ade.*/images/training/*.jpg"))) >= 3)
    os.kill(writer.pid, signal.SIGINT)
    writer.join(timeout=30)
    assert writer.exitcode == 1  # the interrupt reaches the caller
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ade"] * had_one


@pytest.mark.parametrize("wrong", [{"training": 0}, {"validation": 0}, {"seed": -1}, {"size": 20}])
def test_impossible_numbers_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
        write_generated_ade20k(tmp_path / "ade", **wrong)
    assert not list(tmp_path.iterdir())


def test_the_command_line_writes_the_data_set_and_says_in_a_sentence_what_it_refuses(tmp_path, capsys):
    arguments = [str(tmp_path / "ade"), "--training", "2", "--validation", "1", "--seed", "3", "--size", "48"]
    assert main(arguments) == 0
    assert len(contents(tmp_path / "ade")) == 7
    (tmp_path / "ade/notes.txt").write_text("mine")
    assert main([*arguments, "--seed", "4"]) == 2
    assert "notes.txt" in capsys.readouterr().err


def test_processes_that_write_at_once_leave_one_whole_data_set(tmp_path):
    writers = [
        FORK.Process(target=write_generated_ade20k, args=(tmp_path / "ade", 4, 1, 0, 48), daemon=True)
        for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=60)
        assert writer.exitcode == 0
    assert len(contents(tmp_path / "ade")) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["ade"]
