"""`FolderDataset` on small folders: pairs, label maps of each coding, subsets, and what is refused by the name of
the nearest file."""

import hashlib

import numpy as np
import pytest
from mmcv import Config
from PIL import Image

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.checks.duplicates import compare_files
from internseg_ds.data.checks.file_findings import label_maps_without_images
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.samples import sample
from internseg_ds.data_report.doctor import examine
from internseg_ds.data_report.mended_config import write_mended
from internseg_ds.errors import ConfigError, DataError
from tests.conftest import ROOT, TINY
from tests.data.test_label_maps import REDUCED, TEST, TRAIN

RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.fixture
def folder(tmp_path):
    """folder({"north/a": array}, ...): images `NAME.tif` and `NAME_mask.png` of these arrays."""

    def write(masks, root="data"):
        generator = np.random.default_rng(len(masks))
        for name, mask in masks.items():
            mask = np.asarray(mask, np.uint8)
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 255, (*mask.shape[:2], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{path}.tif")
            Image.fromarray(mask).save(f"{path}_mask.png")
        return tmp_path / root

    return write


def entry(root, /, **arguments):
    return dict(
        type="FolderDataset",
        root=str(root),
        images="**/*.tif",
        masks="**/*_mask.png",
        classes=["road", "car"],
        pipeline=TRAIN,
    ) | dict(arguments)


def built(root, /, **arguments):
    return build_datasets(entry(root, **arguments), "data.train")


def labels(dataset, index=0):
    """As they are trained on; and that they are scored against the same ones."""
    trained = sample(dataset, index)["gt_semantic_seg"].data[0].numpy()
    np.testing.assert_array_equal(trained, ground_truth(dataset, index))
    return trained.tolist()


def names(dataset):
    return [info["filename"].removesuffix(".tif") for info in dataset.img_infos]


def test_images_of_nested_folders_have_the_mask_of_what_the_wildcards_match(folder):
    root = folder({"north/a": [[0, 0]], "north/in/a": [[1, 1]], "a": [[1, 0]], "south/b[1]": [[0, 255]]})
    dataset = built(root)
    assert names(dataset) == ["a", "north/a", "north/in/a", "south/b[1]"]
    assert [labels(dataset, index)[0] for index in range(4)] == [[1, 0], [0, 0], [1, 1], [0, 255]]
    (root / "labels").mkdir()
    for mask in (root / "north").glob("*_mask.png"):
        mask.rename(root / "labels" / f"map of {mask.name}")
    assert names(built(root, images="north/*.tif", masks="labels/map of *_mask.png")) == ["north/a"]


def test_masks_are_no_images_and_hidden_files_are_left_out(folder):
    root = folder({"a": [[0, 1]], "in/b": [[1, 0]]})
    for image in root.rglob("*.tif"):
        image.rename(image.with_suffix(".png"))
    (root / "._a.png").write_bytes(b"of some file system")
    assert names(built(root, images="**/*.png")) == ["a.png", "in/b.png"]


def test_several_roots_and_several_endings_are_one_data_set(folder, tmp_path):
    roots = [folder({"a": [[0, 1]]}, "first"), folder({"a": [[1, 0]], "b": [[1, 1]]}, "second")]
    (roots[1] / "b.tif").rename(roots[1] / "b.TIF")
    dataset = built(tmp_path, root=list(map(str, roots)), images=["**/*.tif", "**/*.TIF"])
    assert names(dataset) == ["first/a", "second/a", "second/b.TIF"]
    assert [labels(dataset, index) for index in range(3)] == [[[0, 1]], [[1, 0]], [[1, 1]]]


def test_masks_of_0_and_255_are_background_and_the_one_class_or_two_classes(folder):
    root = folder({"a": [[0, 255, 255]]})
    one = built(root, classes=["building"], label_map="0/255")
    assert list(one.CLASSES) == ["background", "building"] and labels(one) == [[0, 1, 1]]
    assert labels(built(root, label_map="0/255")) == [[0, 1, 1]]
    with pytest.raises(DataError, match=r"a_mask.png has the number 1, of which .*; it has 0, 255"):
        labels(built(folder({"a": [[0, 1, 255]]}), label_map="0/255"))


def test_a_label_map_gives_numbers_classes_by_name_or_place(folder):
    root = folder({"a": [[7, 11, 12, 0, 255]]})
    assert labels(built(root, label_map={7: "car", 11: 0, 12: "road", 0: None})) == [[1, 0, 0, 255, 255]]
    with pytest.raises(ConfigError, match=r"'truck' is none of the classes road, car"):
        built(root, label_map={7: "truck"})
    with pytest.raises(ConfigError, match="would shift"):
        built(root, label_map={7: "car"}, pipeline=REDUCED)


@pytest.mark.parametrize("as_palette", [False, True])
@pytest.mark.parametrize(
    "colours", [{RED: "car", BLUE: "road", "#000000": None}, [BLUE, RED]], ids=["mapping", "order"]
)
def test_masks_in_colours_are_read_as_their_classes(folder, colours, as_palette):
    mask = [[RED, BLUE, (0, 0, 0) if isinstance(colours, dict) else BLUE]]
    root = folder({"a": mask})
    if as_palette:
        Image.open(root / "a_mask.png").quantize(8).save(root / "a_mask.png")
    dataset = built(root, colours=colours)
    assert labels(dataset) == [[1, 0, 255 if isinstance(colours, dict) else 0]]
    assert [list(colour) for colour in dataset.PALETTE] == [list(BLUE), list(RED)]


def test_a_colour_of_no_class_is_named_with_the_nearest(folder):
    root = folder({"a": [[RED, BLUE, (198, 3, 0)]]})
    with pytest.raises(
        DataError, match=r"a_mask.png has the colour \(198, 3, 0\).* nearest is \(200, 0, 0\)"
    ):
        labels(built(root, colours=[BLUE, RED]))
    with pytest.raises(ConfigError, match="colours has none for road"):
        built(root, colours={RED: "car"})


def test_subsets_are_seeded_and_grow(folder):
    root = folder({f"{index:02}": [[index % 2 if index < 4 else 0]] for index in range(20)})
    few, more, other = (
        names(built(root, **chosen)) for chosen in (dict(first=4), dict(first=9), dict(first=9, seed=1))
    )
    assert len(few) == 4 and set(few) < set(more) and len(more) == 9 and more != other
    for count in (1, 2, 3):
        dataset = built(root, per_class=count)
        held = [labels(dataset, index)[0][0] for index in range(len(dataset))]
        assert (held.count(0), held.count(1)) == (count, min(2, count))  # car is in two images only
    (root / "split.txt").write_text("\ufeff03\n07.tif\n\n")
    assert names(built(root, split="split.txt")) == ["03", "07"]
    (root / "split.txt").write_text("3\n")
    with pytest.raises(DataError, match=r"3 of the split file .*split.txt is no image"):
        built(root, split="split.txt")


def test_images_with_rare_classes_are_shown_more_often(folder):
    root = folder({str(index): [[int(index == 3), 0]] for index in range(8)})
    balanced = dict(type="ClassBalancedDataset", dataset=entry(root), oversample_thr=0.5)
    assert build_datasets(balanced, "data.train").indices == [0, 1, 2, 3, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(masks="**/*_masks.png"), r"2 of 2 images.*be a_masks.png \(the nearest file is a_mask.png\)"),
        (dict(images="**/*.jpg"), r"no file of .* matches images='\*\*/\*.jpg'; its files end in 2 "),
        (dict(root="{}x"), r"there is no folder .*datax .*holds data"),
        (dict(images="*.tif"), "has 1 wildcard and masks=.* 2: "),
        (dict(images="a.tif"), "has no wildcard"),
        (dict(images="../*.tif"), "must be a pattern below root"),
        (dict(classes=None), "needs classes"),
        (dict(classes=[]), r"classes=\[\] of FolderDataset must be"),
        (dict(first=0), "first=0 .* at least 1"),
        (dict(first=1, per_class=1), "not both"),
        (dict(label_map="0/255", classes=["a", "b", "c"]), "needs one or two classes"),
        (dict(label_map={0: 0}, colours=[RED, BLUE]), "both label_map and colours"),
        (dict(colours=[RED]), r"as many colours as there are classes \(2\)"),
        (dict(colours=[RED, "red"]), "'red' is no colour"),
        (dict(imges="*"), "images"),
        (dict(root=[]), r"root=\[\] of FolderDataset must be a string, or a list of strings"),
        (dict(images=None), "images=None of FolderDataset must be"),
        (dict(masks=["*.png"]), r"masks=.* of FolderDataset must be a string$"),
        (dict(classes=3), "classes=3 of FolderDataset must be"),
        (dict(classes=[1, 2]), r"classes=\[1, 2\] of FolderDataset must be"),
        (dict(split=5), "split=5 of FolderDataset must be"),
        (dict(seed="a"), "seed='a' of FolderDataset must be a whole number"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, arguments, message):
    root = folder({"a": [[0, 1]], "in/b": [[1, 0]]})
    if arguments.get("root"):
        arguments = {"root": arguments["root"].format(root)}
    with pytest.raises((ConfigError, DataError), match=message):
        built(root, **arguments)


def test_the_doctor_and_a_start_look_at_coded_masks(folder, tmp_path):
    rows = {"a": [[RED, BLUE], [RED, RED]], "in/b": [[BLUE, BLUE], [RED, BLUE]]}
    roots = [folder(rows, "train"), folder({**rows, "c": [[RED, BLUE], [BLUE, RED]]}, "val")]
    train = entry(roots[0], colours=[BLUE, RED])
    val = entry(roots[1], colours=[BLUE, RED], pipeline=TEST)
    cfg = Config.fromfile(ROOT / TINY)
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 2
    cfg.data.train, cfg.data.val, cfg.data.test = train, val, val
    (tmp_path / "experiment.py").write_text(cfg.pretty_text)
    report = examine(read_experiment(tmp_path / "experiment.py"), workers=0)
    assert report.findings == [] and report.scanned["data.train"].labels.pixels == {0: 4, 1: 4}
    assert survey(build_datasets(train, "data.train"), "data.train", training=True) == []
    (roots[0] / "a.tif").rename(roots[0] / "a.TIF")
    given = read_experiment(tmp_path / "experiment.py")
    (finding,) = examine(given, workers=0).findings
    assert finding.name == "suffix" and finding.wrong
    mended = read_experiment(write_mended(given, finding.settings, tmp_path / "mended.py"))
    report = examine(mended, workers=0)
    assert report.findings == [] and report.scanned["data.train"].total == 2
    (roots[0] / "a.TIF").rename(roots[0] / "a.tif")
    Image.fromarray(np.full((2, 2, 3), 9, np.uint8)).save(roots[0] / "a_mask.png")
    (finding,) = examine(read_experiment(tmp_path / "experiment.py"), workers=0).wrong
    assert "colour (9, 9, 9)" in finding.text


def test_files_of_another_case_are_not_left_out_in_silence(folder):
    root = folder({"a": [[0, 1]], "in/b": [[1, 0]], "in/c": [[1, 0]]})
    (root / "in/b.tif").rename(root / "in/b.TIFF")
    with pytest.raises(
        DataError, match=r"1 file is left out, for images=.* does not match .*in/b.TIFF.*2 are"
    ):
        survey(built(root), "data.train", training=True)
    both = built(root, images=["**/*.tif", "**/*.TIFF"])
    assert names(both)[1:] == ["in/b.TIFF", "in/c"] and survey(both, "data.train", training=True) == []
    assert survey(built(root, first=2), "data.train", training=True) == []
    (root / "in/b_mask.png").unlink()
    (warning,) = survey(built(root), "data.train", training=True)
    assert "Rename those that are meant" in warning


def test_masks_without_images_are_counted(folder):
    root = folder({"a": [[0, 1]], "in/b": [[1, 0]]})
    assert list(label_maps_without_images(built(root), [built(root)], "data.train")) == []
    (root / "in/b.tif").unlink()
    (finding,) = label_maps_without_images(built(root), [built(root)], "data.train")
    assert "in/b_mask.png" in finding.text and not finding.wrong


def test_a_folder_is_divided_by_names_alone(folder):
    """Against the hash itself: a change would move images of running experiments to the other side."""
    root = folder({f"scene {index % 3}/{index:03}": [[0, 1]] for index in range(200)})
    sides = {fold: names(built(root, fold=fold, validation_share=0.2)) for fold in ("train", "val")}
    digests = {
        name: int(hashlib.blake2b(name.encode(), digest_size=8).hexdigest(), 16)
        for name in names(built(root))
    }
    assert sides["val"] == [name for name, digest in digests.items() if digest < 0.2 * 2**64]
    assert sorted(sides["train"] + sides["val"]) == sorted(digests) and 25 < len(sides["val"]) < 55
    smaller = names(built(root, fold="val"))
    assert set(smaller) < set(sides["val"]) and 8 < len(smaller) < 32

    folder({"scene 0/new": [[0, 1]], "a": [[1, 0]]})
    moved = root.rename(root.with_name("elsewhere"))
    for fold in ("train", "val"):
        later = names(built(moved, fold=fold, validation_share=0.2))
        assert [name for name in later if name in digests] == sides[fold]
    train = built(moved, fold="train", validation_share=0.2)
    assert compare_files(train, built(moved, fold="val", validation_share=0.2), "data.val") == []
    (warning,) = compare_files(train, built(moved, fold="val", validation_share=0.9), "data.val")
    assert "of data.val are in data.train too" in warning
    few = names(built(moved, fold="train", validation_share=0.2, first=5, seed=1))
    assert len(few) == 5 and not set(few) & set(sides["val"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(fold="validation"), 'must be "train" or "val"'),
        (dict(validation_share=0.1), "needs fold="),
        (dict(fold="val", validation_share=10), "above 0 and below 1"),
        (dict(fold="val", validation_share="0.1"), "above 0 and below 1"),
        (dict(fold="val", validation_share=1e-9), r"none of 1 image falls to fold='val'"),
    ],
)
def test_a_division_that_cannot_be_meant_is_refused(folder, arguments, message):
    root = folder({"a": [[0, 1]]})
    with pytest.raises((ConfigError, DataError), match=message):
        built(root, **arguments)


def test_a_link_to_a_folder_above_it_counts_no_file_twice(folder):
    root = folder({"a": [[0, 1]], "north/b": [[1, 0]]})
    (root / "north/again").symlink_to(root)
    (root / "itself").symlink_to("itself")
    (root / "again").symlink_to("north")  # an ordinary link, to another folder
    dataset = built(root)
    assert [info["filename"] for info in dataset.img_infos] == ["a.tif", "again/b.tif", "north/b.tif"]


def test_the_same_images_below_two_roots_are_refused_and_other_masks_of_them_are_not(folder, tmp_path):
    root = folder({"a": [[0, 1]], "north/b": [[1, 0]]})
    (tmp_path / "link").symlink_to(root)
    for other, number in ((root, 2), (f"{root}/", 2), (root / "north", 1), (tmp_path / "link", 2)):
        with pytest.raises(ConfigError, match=rf"{number} images? (is|are) below both .*RepeatDataset"):
            built(root, root=[str(root), str(other)])
    for annotator in ("first", "second"):
        (tmp_path / annotator / "masks").mkdir(parents=True)
        (tmp_path / annotator / "images").symlink_to(root)
        Image.fromarray(np.uint8([[0, 1]])).save(tmp_path / annotator / "masks/a.png")
    roots = [str(tmp_path / annotator) for annotator in ("first", "second")]
    assert len(built(root, root=roots, images="images/a*.tif", masks="masks/a*.png")) == 2
