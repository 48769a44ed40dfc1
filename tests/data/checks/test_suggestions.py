"""Suggested class weights, mean and deviation, against numpy over all pixels at once."""

import numpy as np
import pytest
from mmseg.datasets.pipelines import LoadAnnotations
from PIL import Image

from internseg_ds.data.checks.image_looks import look_at_image
from internseg_ds.data.checks.label_tally import ClassOfNumber, LabelTally
from internseg_ds.data.checks.looks import LabelLook
from internseg_ds.data.checks.suggestions import mean_and_std, median_frequency_weights
from internseg_ds.data.label_maps import LoadLabelMap


def test_weights_are_the_median_frequency_over_that_of_each_class():
    generator = np.random.default_rng(0)
    maps = [
        generator.choice(numbers, size=(7, 5 + place))
        for place, numbers in enumerate([[0, 1, 255], [1, 3], [0, 1], [255, 3]])
    ]
    tally = LabelTally()
    reader = LoadLabelMap(LoadAnnotations(), 5, 255, reduce_zero_label=False, strict=True)
    for place, labels in enumerate(maps):
        numbers, pixels = np.unique(labels, return_counts=True)
        look = LabelLook(str(place), labels.shape, tuple(numbers.tolist()), tuple(pixels.tolist()))
        tally.add(look, ClassOfNumber(reader, None))
    frequency = {}
    for index in (0, 1, 3):
        having = [labels[labels != 255] for labels in maps if (labels == index).any()]
        frequency[index] = sum((labels == index).sum() for labels in having) / sum(map(len, having))
    median = np.median(list(frequency.values()))
    expected = [median / frequency[index] if index in frequency else 0 for index in range(5)]
    np.testing.assert_allclose(median_frequency_weights(tally, 5), expected, rtol=1e-12)


def test_mean_and_deviation_are_those_of_all_pixels_together(tmp_path):
    generator = np.random.default_rng(1)
    images = [
        generator.integers(0, top, (9, width, 3), dtype=np.uint8) for top, width in ((90, 4), (255, 11))
    ]
    looks = []
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
        looks.append(look_at_image(str(tmp_path / f"{place}.png"), measured=True))
    looks.append(look_at_image(str(tmp_path / "0.png"), measured=False))
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    mean, deviation = mean_and_std(looks)
    assert mean == pytest.approx(pixels.mean(0)) and deviation == pytest.approx(pixels.std(0))
