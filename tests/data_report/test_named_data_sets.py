"""The data sets of configs/_base_/datasets, read by mmseg's own classes from small trees in the layout of mmseg's
converters: what the numbers in the files mean in training and in scores, the checks of a start, and the doctor."""

import subprocess
import sys
import zipfile
from pathlib import Path

import mmseg
import numpy as np
import pytest
from mmcv import Config
from PIL import Image

from internseg_ds.data.checks.survey import survey
from internseg_ds.data.checks.zero_labels import compare_zero_labels
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.samples import sample
from internseg_ds.data_report.doctor import examine
from tests.conftest import ROOT
from tests.data_report.data_set_trees import MEANINGS, NUMBERS, TREES

FOLDER = ROOT / "configs/_base_/datasets"
USUAL = {  # data set: (its layout, the size in which it is read here, the classes that it has)
    "cityscapes": ("512x1024", 19),
    "cityscapes_extra": ("512x1024", 19),
    "mapillary": ("512x1024", 66),
    "coco_stuff164k": ("512x512", 171),
    "coco_stuff10k": ("512x512", 171),
    "pascal_context_59": ("480x480", 59),
    "pascal_context_60": ("480x480", 60),
    "pascal_voc12": ("512x512", 21),
    "pascal_voc12_aug": ("504x504", 21),
    "loveda": ("512x512", 7),
    "potsdam": ("504x504", 6),
    "vaihingen": ("512x512", 6),
    "isaid": ("896x896", 16),
    "nyu_depth_v2": ("480x480_masks", 40),
}
OTHERS = ("ade20k", "folders", "rasters", "loveda_512x512_sat", "mapillary_as_cityscapes")
READING = ("LoadImageFromFile", "LoadAnnotations", "MapillaryHack", "DefaultFormatBundle")


def read(name):
    return Config.fromfile(FOLDER / f"{name}.py")


def crop_of(name):
    """(504, 1008) of "cityscapes_504x1008"."""
    (size,) = [part for part in name.split("_") if part[0].isdigit() and "x" in part]
    return tuple(map(int, size.split("x")))


def as_read(pipeline):
    """The steps that say what a label map means, without those that move or colour the image."""
    steps = [step for step in pipeline if step["type"] in READING]
    return [*steps, dict(type="Collect", keys=["img", "gt_semantic_seg"], meta_keys=["filename"])]


def meanings(labels, classes):
    """What each column of a label map of the trees means."""
    assert (labels == labels[:1]).all()
    return [classes[label] if label != 255 else None for label in labels[0, ::4].tolist()]


def wrong(found, layout):
    """The numbers in the files that do not mean what their data set says."""
    named = dict(zip(NUMBERS[layout], found, strict=True))
    return {number: named[number] for number, name in MEANINGS[layout].items() if named[number] != name}


@pytest.mark.parametrize("layout", USUAL)
def test_a_data_set_is_read_as_its_documents_say(layout, tmp_path, monkeypatch, experiment):
    size, count = USUAL[layout]
    TREES[layout](tmp_path, layout)
    monkeypatch.chdir(tmp_path)
    cfg = read(f"{layout}_{size}")
    bare = build_datasets({**cfg.data.train, "pipeline": as_read(cfg.data.train.pipeline)}, "data.train")
    assert len(bare.CLASSES) == count and len(bare) == (2 if layout.endswith(("_extra", "_aug")) else 1)
    for index in range(len(bare)):
        trained_on = sample(bare, index)["gt_semantic_seg"].data[0].numpy()
        found = meanings(trained_on, bare.CLASSES)
        assert wrong(found, layout) == {} and set(found) - {None} == set(bare.CLASSES)

    val = build_datasets(cfg.data.val, "data.val", test_mode=True)
    assert len(val) == 1 and val.CLASSES == bare.CLASSES
    np.testing.assert_array_equal(ground_truth(val, 0), trained_on)

    train = build_datasets(cfg.data.train, "data.train")
    results = sample(train, 0)
    assert results["img"].data.shape == (3, *crop_of(f"{layout}_{size}"))
    assert set(results["gt_semantic_seg"].data.unique().tolist()) <= {*range(count), 255}
    compare_zero_labels(cfg.data.train, val, "data.val")
    assert [*survey(train, "data.train", training=True), *survey(val, "data.val", training=False)] == []
    report = examine(experiment(cfg.data.train, cfg.data.val, count), workers=0)
    assert [finding.text for finding in report.findings] == []


@pytest.mark.parametrize("size", ["512x1024", "896x896_masks"])
def test_mapillary_as_cityscapes_is_trained_on_both_parts_and_scored_on_cityscapes(
    size, tmp_path, monkeypatch
):
    for layout in ("mapillary", "cityscapes"):
        TREES[layout](tmp_path, layout)
    monkeypatch.chdir(tmp_path)
    cfg = read(f"mapillary_as_cityscapes_{size}")
    train = build_datasets({**cfg.data.train, "pipeline": as_read(cfg.data.train.pipeline)}, "data.train")
    val = build_datasets(cfg.data.val, "data.val", test_mode=True)
    assert len(train) == 2 and train.CLASSES == val.CLASSES and len(val.CLASSES) == 19
    found = meanings(sample(train, 1)["gt_semantic_seg"].data[0].numpy(), train.CLASSES)
    assert [found[number] for number in (0, 13, 55, 65)] == [None, "road", "car", None]
    assert survey(train, "data.train", training=True) == survey(val, "data.val", training=False) == []
    results = sample(build_datasets(cfg.data.train, "data.train"), 0)
    assert results["img"].data.shape == (3, *crop_of(size)) and ("gt_masks" in results) == ("masks" in size)


@pytest.mark.parametrize("layout", [name for name in USUAL if name != "nyu_depth_v2"])
def test_other_sizes_differ_in_their_pipelines_alone(layout):
    def without_pipelines(data):
        parts = ("train", "val", "test")
        return {**data, **{part: {**data[part], "pipeline": None} for part in parts}}

    usual = read(f"{layout}_{USUAL[layout][0]}")
    files = sorted(FOLDER.glob(f"{layout}_[0-9]*x[0-9]*.py"))
    sizes = {crop_of(path.stem)[0] for path in files if not path.stem.endswith("_sat")}
    few = {"cityscapes_extra": {512, 1024}, "pascal_voc12": {512}}
    small = {480, 504, 512, 640} if "context" in layout else {504, 512, 640}
    assert sizes - {1024} == few.get(layout, small if "pascal" in layout else {504, 512, 640, 896}) - {1024}
    for path in files:
        if path.stem.endswith("_sat"):
            continue
        cfg, crop = read(path.stem), crop_of(path.stem)
        assert without_pipelines(cfg.data) == without_pipelines(usual.data)
        steps = {step["type"]: step for step in cfg.data.train.pipeline}
        assert steps["RandomCrop"]["crop_size"] == steps["Pad"]["size"] == cfg.crop_size == crop
        assert [step["type"] for step in cfg.data.train.pipeline] == [
            step["type"] for step in usual.data.train.pipeline
        ]
        assert steps["LoadAnnotations"] == usual.data.train.pipeline[1]
        (aug,) = [step for step in cfg.data.val.pipeline if step["type"] == "MultiScaleFlipAug"]
        multiples = [step.get("size_divisor") for step in aug["transforms"]]
        if layout != "loveda":
            assert (32 in multiples) == (crop[0] != 504)


def test_these_are_all_the_files():
    for path in FOLDER.glob("*.py"):
        name = path.stem
        assert name.startswith(OTHERS) or any(name.startswith(f"{layout}_") for layout in USUAL), name
    layouts = {path.stem for path in (FOLDER.parent / "layouts").glob("*.py")}
    assert layouts == set(USUAL) == set(TREES)


CONVERTERS = Path(mmseg.__file__).parent / ".mim/tools/convert_datasets"
ISPRS_COLOURS = [
    (0, 0, 0),
    (255, 255, 255),
    (0, 0, 255),
    (0, 255, 255),
    (0, 255, 0),
    (255, 255, 0),
    (255, 0, 0),
]


def zipped(path, files):
    """files: {name in the archive: (h, w) or (h, w, 3) array}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in files.items():
            file = path.with_name(name.replace("/", "_"))
            Image.fromarray(array).save(file)
            archive.write(file, name)
            file.unlink()


def columns(values, side):
    """A picture of so many columns of equal width."""
    values = np.array(values, np.uint8)
    return np.repeat(values, -(-side // len(values)), axis=0)[None, :side].repeat(side, axis=0)


def raw_loveda(raw):
    noise = np.zeros((64, 64, 3), np.uint8)
    for part in ("Train", "Val", "Test"):
        files = {}
        for index, place in enumerate(("Rural", "Urban")):
            files[f"{part}/{place}/images_png/{part}{index}.png"] = noise
            if part != "Test":
                files[f"{part}/{place}/masks_png/{part}{index}.png"] = columns(range(8), 64)
        zipped(raw / f"{part}.zip", files)


def raw_potsdam(raw):
    truth = columns(ISPRS_COLOURS, 512)
    names = ("2_10", "5_15")
    zipped(raw / "2_Ortho_RGB.zip", {f"2_Ortho_RGB/top_potsdam_{name}_RGB.tif": truth for name in names})
    zipped(raw / "5_Labels_all.zip", {f"top_potsdam_{name}_label.tif": truth for name in names})


def raw_vaihingen(raw):
    truth, name = columns(ISPRS_COLOURS, 512), "ISPRS_semantic_labeling_Vaihingen"
    areas = ("area1", "area6")
    zipped(raw / f"{name}.zip", {f"top/top_mosaic_09cm_{area}.tif": truth for area in areas})
    truths = {f"top_mosaic_09cm_{area}_noBoundary.tif": truth for area in areas}
    zipped(raw / f"{name}_ground_truth_eroded_COMPLETE.zip", truths)


def raw_isaid(raw):
    colours = [(0, 0, 0), (0, 0, 63), (0, 63, 63), (0, 63, 0), (0, 63, 127), (0, 63, 191), (0, 63, 255)]
    colours += [(0, 127, 63), (0, 127, 127), (0, 0, 127), (0, 0, 191), (0, 0, 255), (0, 191, 127)]
    colours += [(0, 127, 191), (0, 127, 255), (0, 100, 155)]
    truth = columns(colours, 800)  # smaller than a tile: padded by 255
    for part, name in (("train", "P0002"), ("val", "P0003"), ("test", "P0006")):
        zipped(raw / f"{part}/images/part1.zip", {f"images/{name}.png": truth})
        if part != "test":
            masks = {f"images/{name}_instance_color_RGB.png": truth}
            zipped(raw / f"{part}/Semantic_masks/images.zip", masks)


RAW = {"loveda": raw_loveda, "potsdam": raw_potsdam, "vaihingen": raw_vaihingen, "isaid": raw_isaid}


@pytest.mark.slow
@pytest.mark.parametrize("layout", RAW)
def test_mmsegs_converter_writes_what_is_read(layout, tmp_path, monkeypatch):
    """On archives as they are downloaded; those of the other data sets refuse fewer images than there are."""
    raw = tmp_path / "raw"
    RAW[layout](raw)
    monkeypatch.chdir(tmp_path)
    converter = tmp_path / "converter.py"
    text = (CONVERTERS / f"{layout}.py").read_text()
    assert ("mode='P'" in text) == (layout == "isaid")  # which loses numbers, as docs/data_sets.md says
    converter.write_text(text.replace(", mode='P'", ""))
    subprocess.run([sys.executable, str(converter), str(raw)], capture_output=True, check=True)
    cfg = read(f"{layout}_{USUAL[layout][0]}")
    train = build_datasets({**cfg.data.train, "pipeline": as_read(cfg.data.train.pipeline)}, "data.train")
    val = build_datasets(cfg.data.val, "data.val", test_mode=True)
    labels = sample(train, 0)["gt_semantic_seg"].data[0].numpy()
    np.testing.assert_array_equal(ground_truth(val, 0), labels)
    row = list(dict.fromkeys(labels[0].tolist()))
    found = [train.CLASSES[label] if label != 255 else None for label in row]
    assert len(found) == len(NUMBERS[layout]) and wrong(found, layout) == {}
    assert survey(train, "data.train", training=True) == []
