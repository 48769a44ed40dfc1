"""`Segmenter`: images of any kind, the labels of launch/predict.py, and what it refuses."""

import io
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmseg.apis import inference_segmentor, init_segmentor
from PIL import Image

from internseg_ds import Segmenter
from internseg_ds.errors import CheckpointError, ConfigError, DataError
from internseg_ds.evaluation.predict import predict_files


@pytest.fixture(scope="module")
def files(ade20k) -> list[Path]:
    return sorted((ade20k / "images/validation").glob("*.jpg"))[:3]


def test_labels_are_those_of_predict_for_paths_images_and_arrays(weights, segmenter, files, tmp_path):
    predict_files(weights.with_name("config.py"), weights, files, tmp_path, logits=True)
    results = segmenter([str(files[0]), *files[1:]])
    for file, found in zip(files, results, strict=True):
        expected = cv2.imread(str(tmp_path / f"{file.stem}_labels.png"), cv2.IMREAD_UNCHANGED)
        assert found.labels.dtype == np.uint8 and len(np.unique(expected)) > 1
        assert np.array_equal(found.labels, expected)
        logits = torch.from_numpy(np.load(tmp_path / f"{file.stem}_logits.npy"))
        assert found.scores.dtype == np.float32
        np.testing.assert_allclose(found.scores, logits.softmax(0).amax(0).numpy(), rtol=1e-4, atol=1e-6)
    pixels = cv2.imread(str(files[0]))[..., ::-1]
    for image in (pixels, Image.fromarray(np.ascontiguousarray(pixels))):
        assert np.array_equal(segmenter(image).labels, results[0].labels)


def test_mmsegs_own_interface_loads_the_file_and_finds_the_same_labels(weights, segmenter, files):
    model = init_segmentor(str(weights.with_name("config.py")), str(weights), device="cpu")
    assert tuple(model.CLASSES) == segmenter.classes
    for file in files[:2]:
        (labels,) = inference_segmentor(model, str(file))
        assert np.array_equal(labels, segmenter(file).labels)


def test_a_picture_is_the_image_in_the_colours_of_its_classes(segmenter, files):
    found = segmenter(files[0])
    pixels = cv2.imread(str(files[0]))[..., ::-1].astype(float)
    colours = np.array(segmenter.palette, float)[found.labels]
    assert found.picture.mode == "RGB" and found.picture.size == found.labels.shape[::-1]
    np.testing.assert_allclose(np.asarray(found.picture), 0.4 * pixels + 0.6 * colours, atol=1.01)
    assert found.classes[found.labels[0, 0]] == f"class {found.labels[0, 0]}"


def test_grey_images_and_turned_ones_are_read_as_files_are(segmenter, files, tmp_path):
    grey = cv2.cvtColor(cv2.imread(str(files[0])), cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    expected = segmenter(tmp_path / "grey.png").labels
    assert np.array_equal(segmenter(grey).labels, expected)
    turned = Image.open(files[1])
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = segmenter(tmp_path / "turned.png").labels
    assert expected.shape == turned.size
    assert np.array_equal(segmenter(Image.open(tmp_path / "turned.png")).labels, expected)


def test_an_empty_list_has_no_results(segmenter):
    assert segmenter([]) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.jpg", r"no image nowhere\.jpg"),
        (3, "image 0 is a int"),
        (np.zeros((4, 4, 3), np.float32), r"image 0 is an array \(4, 4, 3\) of float32"),
        (np.zeros((4, 4, 4), np.uint8), r"array \(4, 4, 4\) of uint8"),
        (np.zeros((0, 4, 3), np.uint8), r"array \(0, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_refused(image, message, segmenter):
    with pytest.raises(DataError, match=message):
        segmenter(image)


def test_a_damaged_file_is_named(segmenter, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"damaged\.jpg is no picture"):
        segmenter(tmp_path / "damaged.jpg")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    with pytest.raises(DataError, match=r"image 0 cannot be read: .*truncated"):
        segmenter(Image.open(io.BytesIO(whole.getvalue()[:-500])))


def test_weights_without_a_config_ask_for_one_and_take_it(weights, tiny, files, segmenter, tmp_path):
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match=r"carries no config.*config=PATH"):
        Segmenter.from_pretrained(tmp_path / "bare.pth")
    config = tmp_path / "config.py"
    shutil.copy(weights.with_name("config.py"), config)
    given = Segmenter.from_pretrained(tmp_path / "bare.pth", config=config, device="cpu")
    assert given.classes[:2] == ("wall", "building")  # of the data set's class
    assert np.array_equal(given(files[0]).labels, segmenter(files[0]).labels)


def test_folders_that_hold_no_weights_and_devices_that_are_none_are_refused(weights, tmp_path):
    with pytest.raises(CheckpointError, match="there is no weight file"):
        Segmenter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no weights"):
        Segmenter.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="none of torch's"):
        Segmenter.from_pretrained(weights, device="gpu")
    with pytest.raises(ConfigError, match="on CPUs and on GPUs"):
        Segmenter.from_pretrained(weights, device="mps")
