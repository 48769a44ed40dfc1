"""What the doctor says of files, heads and losses, on data with one thing wrong each."""

import numpy as np
import pytest
from PIL import Image

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.checks.looks import GDAL_NODATA
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.samples import sample
from internseg_ds.data_report.doctor import examine
from internseg_ds.data_report.mended_config import write_mended
from internseg_ds.errors import DataError
from tests.data.test_label_maps import TEST, TRAIN
from tests.data_report.small_data import TWO, entry, names, sound, write


@pytest.fixture
def two(experiment, tmp_path):
    """Sound data of two classes, and two(**changes of the training entry)."""
    sound(tmp_path)
    return lambda **changes: experiment(
        {**entry("CustomDataset", tmp_path, "train", **TWO), **changes},
        entry("CustomDataset", tmp_path, "val", **TWO),
    )


def found(report):
    return {finding.name: finding for finding in report.findings}


def mended(given, report, out):
    settings = [setting for finding in report.findings for setting in finding.settings]
    return examine(read_experiment(write_mended(given, settings, out)), workers=0)


def scene(seed):
    """A picture (64, 96, 3) with something to recognise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.BICUBIC)


def test_a_copy_in_another_quality_looks_alike_and_another_scene_does_not(two, tmp_path):
    for number in range(3):
        scene(number).save(tmp_path / f"images/train/{number}.jpg", quality=95)
        scene(10 + number).save(tmp_path / f"images/val/{number}.jpg", quality=95)
        for split in ("train", "val"):
            labels = Image.fromarray(np.tile(np.uint8([0, 1]), (64, 48)))
            labels.save(tmp_path / f"labels/{split}/{number}.png")
    assert examine(two(), workers=0).findings == []
    scene(1).save(tmp_path / "images/val/2.jpg", quality=40)
    report = examine(two(), workers=0)
    assert [finding.name for finding in report.findings] == ["look-alikes"]
    assert report.duplicates.alike == [(f"{tmp_path}/images/train/1.jpg", f"{tmp_path}/images/val/2.jpg")]


def test_a_jpeg_that_was_cut_short_is_named(two, tmp_path):
    file = tmp_path / "images/train/1.jpg"
    scene(0).save(file)
    Image.fromarray(np.tile(np.uint8([0, 1]), (64, 48))).save(tmp_path / "labels/train/1.png")
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 9)  # what some cameras write behind the end
    assert examine(two(), workers=0).findings == []
    file.write_bytes(whole[: len(whole) * 2 // 3])
    of_opencv_4, of_opencv_5 = (f"{file}; copy them again", f"{file} (ends early)")
    (text,) = (finding.text for finding in examine(two(), workers=0).findings)
    assert of_opencv_4 in text or of_opencv_5 in text
    file.write_bytes(b"")
    assert "1.jpg (is empty)" in found(examine(two(), workers=0))["damaged"].text


@pytest.mark.parametrize(("mean", "odd"), [(0.5, True), (120.0, False)])
def test_a_normalize_for_other_numbers_than_those_of_images_is_odd(two, mean, odd):
    step = dict(type="Normalize", mean=[mean] * 3, std=[0.25 if odd else 60.0] * 3, to_rgb=True)
    report = examine(two(pipeline=[*TRAIN[:2], step, *TRAIN[2:]]), workers=0)
    texts = [
        finding.text for finding in report.odd if finding.name == "normalize" and "makes" in finding.text
    ]
    assert len(texts) == odd and not report.wrong


def test_label_maps_without_images_are_counted(two, tmp_path):
    (tmp_path / "images/train/1.jpg").unlink()
    finding = found(examine(two(), workers=0))["label-maps-without-images"]
    assert not finding.wrong and finding.text.startswith("data.train: 1 label map of ")
    assert f"{tmp_path}/labels/train/1.png" in finding.text


def test_label_maps_of_another_ending_are_missing_and_the_setting_mends_it(two, tmp_path):
    for file in list((tmp_path / "labels/train").iterdir()):
        file.rename(file.with_suffix(".tif"))  # a PNG all the same, which no decoder minds
    given = two()
    report = examine(given, workers=0)
    assert names(report) == {"missing-files"}
    (setting,) = found(report)["missing-files"].settings
    assert (setting.key, setting.value) == ("seg_map_suffix", ".tif")
    assert mended(given, report, tmp_path / "mended.py").findings == []


def test_masks_of_16_bits_are_read_as_their_numbers(two, tmp_path):
    assert examine(two(), workers=0).scanned["data.train"].labels.numbers == {0: 16, 1: 16, 255: 4}
    for file in (tmp_path / "labels/train").iterdir():
        Image.fromarray(np.uint16([[0, 1, 65535]] * 4)).save(file)
    report = examine(two(), workers=0)
    labels = report.scanned["data.train"].labels
    assert labels.numbers == {0: 12, 1: 12, 65535: 12} and labels.pixels == {0: 12, 1: 12, 255: 12}
    assert dict(labels.storage) == {"PNG, 16 bits": 3} and report.findings == []
    Image.fromarray(np.uint16([[0, 1, 256]] * 4)).save(tmp_path / "labels/train/1.png")
    assert "256 in" in found(examine(two(), workers=0))["unknown-labels"].text


def test_a_sample_is_the_same_one_every_time(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1]] * 20)
    given = experiment(
        entry("CustomDataset", tmp_path, "train", **TWO), entry("CustomDataset", tmp_path, "val", **TWO)
    )
    first, again = (examine(given, workers=0, sample=6).scanned["data.train"] for _ in range(2))
    files = [look.file for look in first.looks]
    assert files == [look.file for look in again.looks] and len(set(files)) == 6
    assert first.labels.maps == 6 and first.total == 20


def test_too_few_classes_and_another_ignored_label_are_mended_in_each_of_several_heads(two, tmp_path):
    write(tmp_path, "train", [[0, 1, 7], [1, 1, 0], [0, 0, 1]])
    given = two(ignore_index=7)
    head = dict(given.cfg.model.auxiliary_head, num_classes=1)
    given.cfg.model.auxiliary_head = [head, dict(head, num_classes=2, loss_decode=[dict(type="DiceLoss")])]
    (tmp_path / "several.py").write_text(given.cfg.pretty_text)
    given = read_experiment(tmp_path / "several.py")
    report = examine(given, workers=0)
    assert {"classes", "losses"} <= names(report)
    assert [str(setting) for setting in found(report)["losses"].settings] == [
        "model.decode_head.ignore_index=7",
        "model.auxiliary_head.0.ignore_index=7",
        "model.auxiliary_head.1.ignore_index=7",
        "model.auxiliary_head.1.loss_decode.0.ignore_index=7",
    ]
    report = mended(given, report, tmp_path / "mended.py")
    assert names(report) == set(), found(report)


def test_classes_counted_from_1_are_found_and_mended(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[1, 2, 255], [2, 2, 1]])
    given = experiment(*(entry("CustomDataset", tmp_path, split, **TWO) for split in ("train", "val")))
    report = examine(given, workers=0)
    assert "counted from 1" in found(report)["zero-label"].text
    assert mended(given, report, tmp_path / "mended.py").findings == []


def test_the_noise_of_a_jpeg_is_not_taken_for_a_class(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[2] * 3, [1] * 3, [0] * 3], labels=".jpg")  # 2 for noise
    jpeg = dict(TWO, seg_map_suffix=".jpg")
    given = experiment(*(entry("CustomDataset", tmp_path, split, **jpeg) for split in ("train", "val")))
    report = examine(given, workers=0)
    assert names(report) == {"unknown-labels"} and "lossy-label-maps" in found(report)
    assert not [setting for finding in report.findings for setting in finding.settings]


def test_a_folder_in_the_place_of_a_file_is_no_file(two, tmp_path):
    for file in ("labels/train/0.png", "images/train/1.jpg"):
        (tmp_path / file).unlink()
        (tmp_path / file).mkdir()
    said = found(examine(two(), workers=0))
    assert "labels/train/0.png (which is a folder); put" in said["missing-files"].text
    assert "labels/train/1.png" in said["label-maps-without-images"].text


THREE = dict(classes=["road", "car", "tree"], palette=[[9, 9, 9], [200, 0, 0], [0, 99, 0]])


@pytest.mark.parametrize(
    ("rows", "names_of_classes", "likely"),
    [
        ([0, 1, 2, 3], ["road", "car", "tree"], None),
        ([0, 1, 2, 3, 255], ["road", "car", "tree"], "255 stands for none"),
        ([0, 1, 2, 3], ["background", "car", "tree"], "the first class is called background"),
    ],
)
def test_one_number_more_than_classes_has_two_readings_and_neither_is_written(
    experiment, tmp_path, rows, names_of_classes, likely
):
    for split in ("train", "val"):
        write(tmp_path, split, [rows])
    own = dict(THREE, classes=names_of_classes)
    given = experiment(*(entry("CustomDataset", tmp_path, split, **own) for split in ("train", "val")), 3)
    (finding,) = examine(given, workers=0).wrong
    assert finding.name == "zero-label" and not finding.settings
    assert (
        "Either 0 stands for none: write dict(type='LoadAnnotations', reduce_zero_label=True)" in finding.text
    )
    assert "write 4 of them in classes, and num_classes=4" in finding.text
    assert ("likely" in finding.text) == (likely is not None) and (likely or "") in finding.text
    with pytest.raises(DataError, match="Either 0 stands for none"):
        survey(build_datasets(given.train, "data.train"), "data.train", training=True)


def test_a_nodata_value_of_0_tells_the_readings_apart(experiment, tmp_path):
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1, 2, 3]])
        with Image.open(tmp_path / f"labels/{split}/0.png") as image:
            image.save(tmp_path / f"labels/{split}/0.tif", tiffinfo={GDAL_NODATA: "0"})
    tiffs = dict(THREE, seg_map_suffix=".tif")
    given = experiment(*(entry("CustomDataset", tmp_path, split, **tiffs) for split in ("train", "val")), 3)
    report = examine(given, workers=0)
    assert "nodata value" in found(report)["zero-label"].text
    assert mended(given, report, tmp_path / "mended.py").findings == []
    # with a class for each number, it is odd
    four = dict(tiffs, classes=["sea", *THREE["classes"]], palette=[*THREE["palette"], [1, 2, 3]])
    given = experiment(*(entry("CustomDataset", tmp_path, split, **four) for split in ("train", "val")), 4)
    (finding,) = [each for each in examine(given, workers=0).findings if each.name == "nodata-is-a-class"][:1]
    assert not finding.wrong and "trained on as sea" in finding.text and "labels/train/0.tif" in finding.text
    (warning,) = survey(build_datasets(given.train, "data.train"), "data.train", training=True)
    assert warning == finding.text


@pytest.mark.parametrize("label_map", [None, "0/255"])
def test_numbers_that_a_jpeg_made_are_told_to_be_drawn_anew(experiment, tmp_path, label_map):
    noise = np.random.default_rng(0).integers(0, 2, (40, 40)).astype(np.uint8)
    for split in ("train", "val"):
        write(tmp_path, split, [[0, 1]])
        Image.new("RGB", (40, 40)).save(tmp_path / f"images/{split}/0.jpg")
        labels = tmp_path / f"labels/{split}/0.png"
        Image.fromarray(noise * 255).save(labels, format="JPEG", quality=60)  # whatever its name
    own = dict(
        type="FolderDataset",
        root=str(tmp_path),
        classes=["road", "car"],
        **({} if label_map is None else {"label_map": label_map}),
    )
    sets = (
        dict(own, images=f"images/{split}/*.jpg", masks=f"labels/{split}/*.png", pipeline=steps)
        for split, steps in (("train", TRAIN), ("val", TEST))
    )
    given = experiment(*sets)
    report = examine(given, workers=0)
    assert "lossy-label-maps" in found(report)
    name = "unknown-labels" if label_map is None else "no-label-map"
    wrong = next(each for each in report.wrong if each.name == name)
    assert "are JPEGs" in wrong.text and "write the label maps anew" in wrong.text
    with pytest.raises(DataError, match="are JPEGs"):
        survey(build_datasets(given.train, "data.train"), "data.train", training=True)


def test_a_label_map_with_an_alpha_channel_says_what_is_where(two, tmp_path):
    file = tmp_path / "labels/train/1.png"
    numbers = np.tile(np.uint8([0, 1, 1]), (4, 1))
    opaque = np.full_like(numbers, 255)
    cases = {
        "save the first one alone": [numbers, opaque],
        "if alpha tells the classes apart, save that channel alone": [opaque * 0] * 3 + [numbers],
        "alpha, which holds 0, 1; turn its colours": [numbers, opaque, numbers, numbers],
        "alpha; turn its colours": [numbers, opaque, numbers, opaque],
    }
    for text, channels in cases.items():
        Image.fromarray(np.stack(channels, -1)).save(file)
        finding = found(examine(two(), workers=0))["colour-coded"]
        assert text in finding.text and finding.wrong, finding.text
        assert "keep one of them" not in finding.text


def test_an_empty_label_map_is_called_empty(two, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"labels/{split}/1.png").write_bytes(b"")
    given = two()
    assert "labels/val/1.png (it is empty)" in found(examine(given, workers=0))["damaged"].text
    with pytest.raises(DataError, match=r"labels/train/1\.png is no picture that can be read: it is empty;"):
        sample(build_datasets(given.train, "data.train"), 1)
    val = build_datasets(given.val, "data.val", test_mode=True)
    with pytest.raises(DataError, match=rf"{tmp_path}/labels/val/1\.png cannot be read: it is empty"):
        ground_truth(val, 1)
