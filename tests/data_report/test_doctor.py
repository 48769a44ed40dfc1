"""The data doctor and a start's quick form, on data with one thing wrong each, which both must find by its
name; on sound data in the layouts of the published data sets, which neither may refuse."""

import numpy as np
import pytest
from PIL import Image

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.checks.zero_labels import compare_zero_labels
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data_report.doctor import examine
from internseg_ds.data_report.mended_config import write_mended
from internseg_ds.data_report.page import write_page
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import ConfigError, DataError, OutputError, UserError
from internseg_ds.preflight.dataset_checks import training_set
from tests.data.test_label_maps import TRAIN
from tests.data_report.small_data import TWO, entry, names, sound, write


def start(experiment):
    """A start's quick form."""
    train = build_datasets(experiment.train, "data.train")
    val = build_datasets(experiment.val, "data.val", test_mode=True)
    compare_zero_labels(experiment.train, val, "data.val")
    return [*survey(train, "data.train", training=True), *survey(val, "data.val", training=False)]


def test_sound_data_are_passed_and_shown(experiment, tmp_path):
    sound(tmp_path)
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    report = examine(given, workers=1)
    assert report.findings == [] and start(given) == []
    page = write_page(report, given, tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 9 and "http" not in page and "Nothing." in page
    with pytest.raises(ConfigError, match="no setting"):
        write_mended(given, [], tmp_path / "mended.py")


@pytest.mark.parametrize("trained", [True, False])
def test_zero_reduced_on_one_side_alone_is_found_and_mended(experiment, tmp_path, trained):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1, 2], [1, 1, 2]])
    train = entry("CustomDataset", tmp_path, "train", **TWO)
    train["pipeline"] = [TRAIN[0], dict(type="LoadAnnotations", reduce_zero_label=trained), *TRAIN[2:]]
    given = experiment(train, entry("CustomDataset", tmp_path, "val", reduce_zero_label=not trained, **TWO))
    report = examine(given, workers=0)
    assert "zero-label" in names(report)
    with pytest.raises(ConfigError, match=r"reduce_zero_label=.* of data.val"):
        start(given)
    settings = [setting for finding in report.findings for setting in finding.settings]
    mended = write_mended(given, settings, tmp_path / "mended.py")
    assert names(examine(read_experiment(mended), workers=0)) == set()
    with pytest.raises(OutputError, match="not overwritten"):
        write_mended(given, settings, mended)


def test_masks_of_0_and_255_are_found(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 255], [255, 0]])
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    assert names(examine(given, workers=0)) == {"masks-0-255"}
    with pytest.raises(DataError, match="255 is meant to be car"):
        start(given)


def test_pictures_that_exif_turns_are_found_and_mended(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1, 0], [1, 1, 0]], exif=6)
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    report = examine(given, workers=0)
    assert names(report) == {"exif-turned"}
    with pytest.raises(DataError, match=r"EXIF of .* turns it by 90 degrees"):
        start(given)
    settings = [setting for finding in report.findings for setting in finding.settings]
    mended = read_experiment(write_mended(given, settings, tmp_path / "mended.py"))
    assert names(examine(mended, workers=0)) == set() and start(mended) == []


def test_a_tiff_is_turned_by_whatever_reads_it_and_its_label_map_must_be_too(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1, 0], [1, 1, 0]], image=".tif")
        for file in (tmp_path / f"images/{split}").iterdir():
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, tiffinfo={0x0112: 6})
    images = dict(TWO, img_suffix=".tif")
    given = experiment(*(entry("CustomDataset", tmp_path, split, **images) for split in ("train", "val")))
    assert names(examine(given, workers=0)) == set() and start(given) == []
    for split in ("train", "val"):
        for file in (tmp_path / f"labels/{split}").iterdir():
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    assert names(examine(given, workers=0)) == {"other-sides"}  # color_ignore_orientation does not mend it
    with pytest.raises(DataError, match=r"have other sides than their images"):
        start(given)


def test_images_left_out_for_an_upper_case_ending_are_found_and_mended(experiment, tmp_path):
    sound(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"images/{split}/1.jpg").rename(tmp_path / f"images/{split}/1.JPG")
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    report = examine(given, workers=0)
    assert names(report) == {"suffix"}
    with pytest.raises(DataError, match=r"1 file of .* is left out"):
        start(given)
    settings = [setting for finding in report.findings for setting in finding.settings]
    mended = read_experiment(write_mended(given, settings, tmp_path / "mended.py"))
    report = examine(mended, workers=0)
    assert names(report) == set() and len(report.datasets["data.train"]) == 3


def test_copies_in_the_validation_set_are_named(experiment, tmp_path):
    sound(tmp_path)
    (tmp_path / "images/val/2.jpg").write_bytes((tmp_path / "images/train/0.jpg").read_bytes())
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    report = examine(given, workers=0)
    assert [finding.name for finding in report.odd] == ["duplicates"] and not report.wrong
    assert report.duplicates.same == [(f"{tmp_path}/images/train/0.jpg", f"{tmp_path}/images/val/2.jpg")]


def test_label_maps_in_colours_are_named_with_their_classes(experiment, tmp_path):
    sound(tmp_path)
    for index in range(3):
        picture = np.zeros((4, 3, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
        Image.fromarray(picture).save(tmp_path / f"labels/train/{index}.png")
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    (finding,) = examine(given, workers=0).wrong
    assert finding.name == "colour-coded" and "(200, 0, 0) is car" in finding.text
    with pytest.raises(UserError, match="3 numbers for each pixel"):
        start(given)


LAYOUTS = {
    "ADE20KDataset": dict(numbers=range(151), reduced=True),
    "CityscapesDataset": dict(
        numbers=[*range(19), 255], image="_leftImg8bit.png", labels="_gtFine_labelTrainIds.png"
    ),
    "PascalVOCDataset": dict(numbers=[*range(21), 255], split=True, palette=list(range(256)) * 3),
    "PascalContextDataset": dict(numbers=range(60), split=True),
    "PascalContextDataset59": dict(numbers=range(60), split=True, reduced=True),
    "COCOStuffDataset": dict(numbers=[*range(171), 255], labels="_labelTrainIds.png"),
    "LoveDADataset": dict(numbers=range(8), reduced=True, image=".png"),
    "PotsdamDataset": dict(numbers=range(7), reduced=True, image=".png"),
    "iSAIDDataset": dict(numbers=[*range(16), 255], image=".png", labels="_instance_color_RGB.png"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_published_layouts_are_right(experiment, tmp_path, kind):
    layout = dict(LAYOUTS[kind])
    numbers, reduced, split = layout.pop("numbers"), layout.pop("reduced", False), layout.pop("split", False)
    entries = []
    for name in ("train", "val"):
        write(tmp_path, name, [list(numbers)] * 2, **layout)
        (tmp_path / f"{name}.txt").write_text("0\n1\n")
        entries.append(entry(kind, tmp_path, name, **(dict(split=f"{name}.txt") if split else {})))
    entries[0]["pipeline"] = [
        TRAIN[0],
        dict(type="LoadAnnotations", reduce_zero_label=reduced),
        *TRAIN[2:],
    ]
    given = experiment(*entries, classes=len(numbers) - (255 in numbers) - reduced)
    assert examine(given, workers=0).findings == [] and start(given) == []


def test_a_training_set_without_label_maps_is_found(experiment, tmp_path):
    sound(tmp_path)
    entries = [entry("CustomDataset", tmp_path, split, **TWO) for split in ("train", "val")]
    del entries[0]["ann_dir"]
    given = experiment(*entries)
    assert "no-label-maps" in names(examine(given, workers=0))
    with pytest.raises(DataError, match=r"data\.train: CustomDataset of .* has no label maps.*its ann_dir"):
        training_set(given, build_on_meta(given.model))


def test_images_of_other_channels_than_the_backbone_takes_are_found(experiment, tmp_path):
    sound(tmp_path)
    entries = [entry("CustomDataset", tmp_path, split, **TWO) for split in ("train", "val")]
    for each in entries:
        each["pipeline"] = [
            TRAIN[0],
            dict(type="Normalize", mean=[1.0] * 4, std=[1.0] * 4, to_rgb=False),
            *TRAIN[1:],
        ]
    found = [each for each in examine(experiment(*entries), workers=0).findings if each.name == "channels"]
    assert len(found) == 2 and all(each.wrong and "takes 3" in each.text for each in found)


@pytest.mark.parametrize("classes", [["car"], ["road", "car"]])
def test_binary_masks_without_a_label_map_are_found_and_mended(experiment, tmp_path, classes):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 255], [255, 0]])
    entries = []
    for split in ("train", "val"):
        of_folder = dict(TWO, classes=classes, type="FolderDataset", root=str(tmp_path))
        of_folder |= dict(images=f"images/{split}/*.jpg", masks=f"labels/{split}/*.png", palette=None)
        entries.append({**of_folder, "pipeline": entry("", tmp_path, split)["pipeline"]})
    report = examine(experiment(*entries), workers=0)
    assert names(report) == {"masks-0-255"}
    settings = [setting for finding in report.findings for setting in finding.settings]
    mended = read_experiment(write_mended(experiment(*entries), settings, tmp_path / "mended.py"))
    assert mended.train["label_map"] == "0/255" and 'label_map="0/255"' in report.wrong[0].text
