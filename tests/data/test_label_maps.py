"""Label maps against numbers worked out by hand, and against mmseg's own reading where that one is right."""

import numpy as np
import pytest
import torch
from mmseg.core import intersect_and_union
from mmseg.datasets import CustomDataset
from PIL import Image

from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.label_maps import CheckAnnotation, LoadLabelMap, ground_truth
from internseg_ds.data.loading import evaluation_images
from internseg_ds.data.samples import sample
from internseg_ds.errors import ConfigError, DataError
from internseg_ds.evaluation.evaluator import areas, confusion_matrix

TRAIN = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="DefaultFormatBundle"),
    dict(type="Collect", keys=["img", "gt_semantic_seg"], meta_keys=["filename"]),
]
REDUCED = [TRAIN[0], dict(type="LoadAnnotations", reduce_zero_label=True), *TRAIN[2:]]
TEST = [
    dict(type="LoadImageFromFile"),
    dict(
        type="MultiScaleFlipAug",
        img_scale=None,
        img_ratios=[1.0],
        flip=False,
        transforms=[dict(type="ImageToTensor", keys=["img"]), dict(type="Collect", keys=["img"])],
    ),
]


def colours(count: int) -> list[list[int]]:
    return [[index % 256, index // 256, 0] for index in range(count)]


@pytest.fixture
def data(tmp_path):
    """make(label map, ..., pipeline=, **arguments): mmseg's data set of black images with these label
    maps."""

    def make(*maps: np.ndarray, pipeline=TRAIN, suffix=".png", test_mode=False, **arguments):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for index, labels in enumerate(maps):
            Image.new("RGB", labels.shape[1::-1]).save(tmp_path / f"images/{index}.jpg")
            Image.fromarray(labels).save(tmp_path / f"labels/{index}{suffix}")
        entry = dict(
            type="CustomDataset",
            data_root=str(tmp_path),
            img_dir="images",
            ann_dir="labels",
            seg_map_suffix=suffix,
            pipeline=pipeline,
            **arguments,
        )
        return build_datasets(entry, "data.train", test_mode=test_mode)

    return make


def trained_on(dataset, index=0) -> np.ndarray:
    return sample(dataset, index)["gt_semantic_seg"].data[0].numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_whole_numbers_of_any_width_are_classes(data, dtype):
    labels = np.array([[0, 1, 2], [2, 1, 255]], dtype)
    assert (
        trained_on(
            data(
                labels,
                suffix=".tif" if dtype == np.int32 else ".png",
                classes=list("abc"),
                palette=colours(3),
            )
        ).tolist()
        == labels.tolist()
    )


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([[0, 256]], np.uint16), r"0\.png has label 256"),
        (np.array([[0, 513]], np.uint16), "has label 513"),
        (np.array([[0, 7]], np.uint8), "has label 7"),
    ],
)
def test_a_number_that_is_no_class_is_named_as_it_stands_in_the_file(data, labels, words):
    with pytest.raises(DataError, match=words + ".* classes 0 to 2 and 255"):
        trained_on(data(labels, classes=list("abc"), palette=colours(3)))


def test_numbers_that_are_not_whole_are_refused_and_whole_ones_in_floats_are_not(data):
    with pytest.raises(DataError, match=r"has the value 0\.5"):
        trained_on(
            data(np.array([[0, 0.5]], np.float32), suffix=".tif", classes=list("abc"), palette=colours(3))
        )
    assert trained_on(
        data(np.array([[0, 2.0]], np.float32), suffix=".tif", classes=list("abc"), palette=colours(3))
    ).tolist() == [[0, 2]]


def test_a_coloured_label_map_says_so(data):
    with pytest.raises(DataError, match=r"1 x 2 x 3:.*3 numbers"):
        trained_on(data(np.zeros((1, 2, 3), np.uint8), classes=list("abc"), palette=colours(3)))


@pytest.mark.parametrize("none", [-1, 65535, 255])
def test_what_files_of_other_widths_write_for_none_is_none(data, none):
    labels = np.array([[0, none]], np.int32)
    assert trained_on(data(labels, suffix=".tif", classes=list("abc"), palette=colours(3))).tolist() == [
        [0, 255]
    ]


def test_an_image_of_one_pixel_has_a_label_map_of_one(data):
    assert trained_on(data(np.array([[2]], np.uint8), classes=list("abc"), palette=colours(3))).tolist() == [
        [2]
    ]
    assert trained_on(
        data(np.array([[2], [1]], np.uint8), classes=list("abc"), palette=colours(3))
    ).tolist() == [[2], [1]]


@pytest.mark.parametrize("classes", [("b", "d"), ("d", "b"), ("c", "d"), ("a", "b", "c", "d"), ("d",)])
@pytest.mark.parametrize("reduced", [False, True])
def test_classes_pick_and_order_what_the_numbers_mean_after_zero_is_reduced(
    data, monkeypatch, classes, reduced
):
    monkeypatch.setattr(CustomDataset, "CLASSES", tuple("abcd"))
    monkeypatch.setattr(CustomDataset, "PALETTE", colours(4))
    raw = np.array([[0, 1, 2], [3, 4 if reduced else 2, 255]], np.uint8)
    names = (None, *"abcd") if reduced else tuple("abcd")  # what a number in the file stands for
    expected = [
        [
            classes.index(names[value]) if value < len(names) and names[value] in classes else 255
            for value in row
        ]
        for row in raw.tolist()
    ]
    common = dict(classes=classes, reduce_zero_label=reduced)
    assert trained_on(data(raw, pipeline=REDUCED if reduced else TRAIN, **common)).tolist() == expected
    dataset = data(raw, pipeline=TEST, test_mode=True, **common)
    assert ground_truth(dataset, 0).tolist() == expected
    assert [colours(4)["abcd".index(name)] for name in classes] == dataset.PALETTE


def test_all_classes_of_a_reduced_set_are_read_as_mmseg_reads_them(data):
    raw = np.random.default_rng(0).integers(0, 5, (20, 30)).astype(np.uint8)
    raw[0, :5] = 255
    dataset = data(
        raw, pipeline=TEST, test_mode=True, classes=list("abcd"), palette=colours(4), reduce_zero_label=True
    )
    predicted = np.random.default_rng(1).integers(0, 4, raw.shape)
    theirs = intersect_and_union(predicted, raw.copy(), 4, 255, label_map={}, reduce_zero_label=True)
    ours = areas(
        confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(ground_truth(dataset, 0)), 4, 255)
    )
    assert torch.equal(ours, torch.stack(theirs).double())
    expected = np.where(raw == 0, 255, raw - 1)
    expected[raw == 255] = 255
    assert np.array_equal(
        trained_on(data(raw, pipeline=REDUCED, classes=list("abcd"), palette=colours(4))), expected
    )


def test_a_loader_for_scores_that_reduces_by_itself_is_not_reduced_twice(data):
    raw = np.array([[0, 1, 2]], np.uint8)
    settings = dict(
        pipeline=TEST,
        test_mode=True,
        classes=list("ab"),
        palette=colours(2),
        gt_seg_map_loader_cfg=dict(reduce_zero_label=True),
    )
    for reduce_zero_label in (False, True):
        assert ground_truth(data(raw, reduce_zero_label=reduce_zero_label, **settings), 0).tolist() == [
            [255, 0, 1]
        ]


@pytest.mark.parametrize("reduced", [False, True])
def test_eight_hundred_classes_are_trained_and_scored(data, reduced):
    raw = np.array([[0, 300, 846], [255, 256, 65535]], np.uint16) + np.uint16(reduced)
    raw[1, 2] = 65535
    expected = [[0, 300, 846], [255, 256, 65535]]
    settings = dict(
        classes=[f"class {index}" for index in range(847)],
        palette=colours(847),
        ignore_index=65535,
        reduce_zero_label=reduced,
    )
    assert trained_on(data(raw, pipeline=REDUCED if reduced else TRAIN, **settings)).tolist() == expected
    dataset = data(raw, pipeline=TEST, test_mode=True, **settings)
    (image,) = evaluation_images(dataset, rank=0, world_size=1, workers=0, device=torch.device("cpu"))
    assert image.truth.tolist() == expected
    predicted = torch.tensor([[0, 300, 5], [255, 0, 0]])
    intersection, union, _, truth = areas(confusion_matrix(predicted, image.truth, 847, 65535)).long()
    assert (
        intersection.nonzero().flatten().tolist() == [0, 255, 300]
        and int(truth.sum()) == 5
        and int(union[846]) == 1
    )


def test_more_than_255_classes_need_another_number_for_none(data):
    with pytest.raises(ConfigError, match=r"ignore_index=255 is a class.*300"):
        data(
            np.zeros((2, 2), np.uint8),
            classes=[f"class {index}" for index in range(300)],
            palette=colours(300),
        )


def test_a_number_of_no_class_counts_as_wrong_in_scores(data):
    raw = np.array([[0, 1, 40, 255]], np.uint8)
    truth = ground_truth(data(raw, pipeline=TEST, test_mode=True, classes=list("abc"), palette=colours(3)), 0)
    assert truth.tolist() == [[0, 1, 3, 255]]
    confusion = confusion_matrix(torch.zeros(1, 4, dtype=torch.long), torch.from_numpy(truth), 3, 255)
    assert confusion[-1].tolist() == [1, 0, 0, 0]


def test_a_loader_of_the_users_own_stays_and_what_it_returns_is_checked(data):
    from mmseg.datasets import PIPELINES
    from mmseg.datasets.pipelines import LoadAnnotations

    @PIPELINES.register_module(force=True)
    class Doubling(LoadAnnotations):
        def __call__(self, results):
            results = super().__call__(results)
            results["gt_semantic_seg"] = 2 * results["gt_semantic_seg"]
            return results

    own = [TRAIN[0], dict(type="Doubling"), *TRAIN[2:]]
    dataset = data(
        np.array([[0, 1], [1, 1]], np.uint8), pipeline=own, classes=list("abc"), palette=colours(3)
    )
    assert [type(step) for step in dataset.pipeline.transforms][1:3] == [Doubling, CheckAnnotation]
    assert trained_on(dataset).tolist() == [[0, 2], [2, 2]]
    with pytest.raises(DataError, match=r"label 4,.*0 to 2"):
        trained_on(
            data(np.array([[0, 2], [0, 0]], np.uint8), pipeline=own, classes=list("abc"), palette=colours(3))
        )


@pytest.mark.parametrize("turn", [6, 8])
def test_a_label_map_that_is_not_turned_with_its_image_is_an_error_that_says_exif(data, tmp_path, turn):
    dataset = data(np.zeros((4, 6), np.uint8), classes=list("abc"), palette=colours(3))
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = turn
    picture.save(tmp_path / "images/0.jpg", exif=exif)
    with pytest.raises(
        DataError,
        match=r"4 x 6.*6 x 4.*EXIF of .*0\.jpg.*color_ignore_orientation",
    ):
        sample(dataset, 0)
    unturned = [dict(TRAIN[0], color_type="color_ignore_orientation"), *TRAIN[1:]]
    assert sample(data(pipeline=unturned, classes=list("abc"), palette=colours(3)), 0)["img"].data.shape[
        1:
    ] == (4, 6)


def test_ours_takes_the_place_of_mmsegs_loader(data):
    dataset = data(np.zeros((2, 2), np.uint8), classes=list("abc"), palette=colours(3))
    assert isinstance(dataset.pipeline.transforms[1], LoadLabelMap) and isinstance(
        dataset.gt_seg_map_loader, LoadLabelMap
    )
