import numpy as np

from internseg_ds.evaluation.visualization import overlay, side_by_side

CLASSES, PALETTE = ("sky", "road"), [[0, 0, 255], [255, 0, 0]]  # RGB


def test_an_overlay_tints_each_class_with_its_colour_and_leaves_ignored_pixels_alone():
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255], [0, 1, -1]])
    tinted = overlay(image, labels, PALETTE, opacity=0.5)
    assert tinted[0, 0].tolist() == [178, 50, 50]  # BGR: halfway from grey to blue
    assert tinted[0, 1].tolist() == [50, 50, 178]
    assert (tinted[:, 2] == 100).all()


def test_a_panorama_does_not_make_a_picture_without_end():
    image = np.zeros((10, 22000, 3), np.uint8)
    height, width, _ = side_by_side(
        image, [("prediction", np.zeros((10, 22000), int))], CLASSES, PALETTE
    ).shape
    assert width < 4000 and height < 200


def test_the_legend_grows_with_the_classes_that_appear():
    image = np.zeros((50, 70, 3), np.uint8)
    names, colours = [f"class number {index}" for index in range(40)], [[index, 0, 0] for index in range(40)]
    few = side_by_side(image, [("prediction", np.zeros((50, 70), int))], names, colours)
    many = side_by_side(image, [("prediction", np.arange(3500).reshape(50, 70) % 40)], names, colours)
    assert many.shape[0] > few.shape[0] and many.shape[1] == few.shape[1]


def test_the_three_hundredth_class_has_its_colour_and_its_name():
    names, colours = (
        [f"class {index}" for index in range(400)],
        [[index % 256, index // 256, 9] for index in range(400)],
    )
    labels = np.full((50, 70), 300)
    # 300 = 256 + 44
    assert overlay(np.zeros((50, 70, 3), np.uint8), labels, colours, opacity=1.0)[0, 0].tolist() == [9, 1, 44]
    picture = side_by_side(np.zeros((50, 70, 3), np.uint8), [("prediction", labels)], names, colours)
    assert (picture == [9, 1, 44]).all(-1).any()
