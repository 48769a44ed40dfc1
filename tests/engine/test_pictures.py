import numpy as np

from internseg_ds.engine.pictures import IGNORE, overlay, side_by_side

CLASSES, PALETTE = ("sky", "road"), [[0, 0, 255], [255, 0, 0]]  # RGB


def test_an_overlay_tints_each_class_with_its_colour_and_leaves_ignored_pixels_alone():
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, IGNORE], [0, 1, IGNORE]])
    tinted = overlay(image, labels, PALETTE, opacity=0.5)
    assert tinted[0, 0].tolist() == [178, 50, 50]  # BGR: halfway from grey to blue
    assert tinted[0, 1].tolist() == [50, 50, 178]
    assert tinted[0, 2].tolist() == [100, 100, 100]


def test_a_panorama_does_not_make_a_picture_without_end():
    image = np.zeros((10, 22000, 3), np.uint8)
    height, width, _ = side_by_side(image, [("prediction", np.zeros((10, 22000), int))], CLASSES, PALETTE).shape
    assert width < 4000 and height < 200


def test_the_legend_grows_with_the_classes_that_appear():
    image = np.zeros((50, 70, 3), np.uint8)
    names, colours = [f"class number {index}" for index in range(40)], [[index, 0, 0] for index in range(40)]
    few = side_by_side(image, [("prediction", np.zeros((50, 70), int))], names, colours)
    many = side_by_side(image, [("prediction", np.arange(3500).reshape(50, 70) % 40)], names, colours)
    assert many.shape[0] > few.shape[0] and many.shape[1] == few.shape[1]
