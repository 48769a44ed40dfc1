"""The sizes of images at which a run trains and tests, side by side: a crop that was changed in one place is
easily left at the old size in another."""

from collections.abc import Sequence

from internseg_ds.config.experiment import Experiment


def size_lines(experiment: Experiment, crop: Sequence[int]) -> tuple[str, list[str]]:
    """What the log says of sizes, and warnings. crop: height and width of a training image as it comes out of
    its pipeline."""
    test_cfg, img_size = experiment.model.test_cfg, experiment.model.backbone.get("img_size")
    slides = test_cfg["mode"] == "slide"
    window = (
        f"windows of {_pixels(test_cfg['crop_size'])}, stride {_pixels(test_cfg['stride'])}"
        if slides
        else "whole images"
    )
    backbone = (
        ", img_size of the backbone "
        f"{_pixels((img_size, img_size) if isinstance(img_size, int) else img_size)}"
        if img_size is not None
        else ""
    )
    warnings = []
    if slides and tuple(crop) != tuple(test_cfg["crop_size"]):
        warnings.append(
            f"training images have {_pixels(crop)} pixels and test windows "
            f"{_pixels(test_cfg['crop_size'])}; a crop_size that is changed over a "
            "_base_ changes neither its pipelines nor model.test_cfg.crop_size, which have to be set "
            "themselves"
        )
    return f"training images of {_pixels(crop)}, tested on {window}{backbone}", warnings


def _pixels(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
