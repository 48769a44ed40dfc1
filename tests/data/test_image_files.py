"""Pictures to look at of images that OpenCV does not read, or reads otherwise than the pipeline does."""

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmseg.datasets import PIPELINES
from PIL import Image

from internseg_ds.data.image_files import GivenImages, ImageFiles, picture
from internseg_ds.data.samples import sample
from internseg_ds.errors import DataError
from tests.data.rasters.test_raster_files import written


@PIPELINES.register_module(force=True)
class LoadBands:
    """An image of any number of bands from a .npy file."""

    def __call__(self, results):
        results["img"] = np.load(results["img_info"]["filename"])
        return results


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_bands_of_any_kind_are_stretched_to_eight_bits(tmp_path, bands, dtype):
    values = np.zeros((4, 5, bands), dtype)
    values[0, 0], values[1, 1] = 4000, 1000
    np.save(tmp_path / "a.npy", values)
    shown = picture(ImageFiles([tmp_path / "a.npy"], [dict(type="LoadBands")]), 0)
    assert shown.shape == (4, 5, 3) and shown.dtype == np.uint8
    assert [shown[place].tolist() for place in ((0, 0), (1, 1), (2, 2))] == [[255] * 3, [64] * 3, [0] * 3]


def test_an_image_without_channels_and_one_of_a_single_value_have_a_picture(tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 5), 7, np.uint16))
    assert (picture(ImageFiles([tmp_path / "a.npy"], [dict(type="LoadBands")]), 0) == 0).all()


def test_a_picture_is_turned_as_the_pipeline_turns_it(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    for color_type, size in (("color", (6, 4)), ("color_ignore_orientation", (4, 6))):
        assert (
            picture(
                ImageFiles([tmp_path / "a.jpg"], [dict(type="LoadImageFromFile", color_type=color_type)]), 0
            ).shape[:2]
            == size
        )


def test_a_picture_of_a_data_set_with_absolute_names_is_found(tmp_path):
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "a.png")
    dataset = ImageFiles([tmp_path / "a.png"], [dict(type="LoadImageFromFile")])
    assert (
        picture(
            SimpleNamespace(
                img_infos=dataset.img_infos, pipeline=dataset.pipeline, pre_pipeline=dataset.pre_pipeline
            ),
            0,
        )
        == 9
    ).all()


def test_a_given_picture_of_16_bits_is_read_as_its_file_is(tmp_path):
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000).save(tmp_path / "a.png")
    pipeline = [dict(type="LoadImageFromFile")]
    with Image.open(tmp_path / "a.png") as given:
        assert given.mode == "I;16"
        images = GivenImages([given, tmp_path / "a.png"], pipeline)
    shown = [picture(images, place) for place in (0, 1)]
    assert len(np.unique(shown[0])) > 20 and np.array_equal(*shown)
    with pytest.raises(DataError, match=r"image 0 has values of 32 bits"):
        GivenImages([Image.new("F", (6, 4))], pipeline)


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("alpha", ["yes", "premultiplied", "unspecified"])
def test_an_image_with_an_alpha_channel_is_read_alike_from_its_path_and_from_pillow(tmp_path, ending, alpha):
    values = np.random.default_rng(0).integers(0, 256, (8, 9, 4)).astype(np.uint8)
    file = tmp_path / f"a.{ending}"
    if ending == "tif":
        values[..., :3] //= 2
        values[..., 3] |= 128  # premultiplied colours are no larger than alpha
        written(file, values, photometric="RGB", alpha=alpha)
    else:
        Image.fromarray(values).save(file)
    given = GivenImages([file, Image.open(file)], [dict(type="LoadImageFromFile")])
    of_path, of_pillow = (given[place]["img"].astype(int) for place in (0, 1))
    # what is stored multiplied, Pillow divides, and rounds
    assert np.abs(of_path - of_pillow).max() <= (alpha == "premultiplied" and ending == "tif")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_opencv_does_not_read_in_colour_are_named(tmp_path, dtype):
    cv2.imwrite(str(tmp_path / "a.tif"), np.ones((8, 9, 3), dtype))
    files = ImageFiles([tmp_path / "a.tif"], [dict(type="LoadImageFromFile")])
    with pytest.raises(DataError, match=rf"a\.tif has values of {np.dtype(dtype)}.*scale them.*LoadRaster"):
        sample(files, 0)
