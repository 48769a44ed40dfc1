"""preprocessor_config.json of a folder of transformers: how an experiment's test pipeline prepares images, as far as
transformers' image processors can say it, and the windows that it evaluates with.

In: an `Experiment`. Out: the fields of the file. The pipeline itself, step by step, is in the config beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.entries import leaf_datasets, steps_of, with_inner_steps

BILINEAR = 2
"""PIL's number of the interpolation."""
LARGEST = 255
"""Of an 8-bit image; transformers' mean and std are of images from 0 to 1."""


def preprocessor_config(experiment: Experiment, processor: str, *, splits: bool) -> dict[str, Any]:
    """The fields of the file for the class `processor` of transformers. splits: that cuts the resized image into
    squares itself. channels: the order in which the model takes them; processors give RGB."""
    steps = _test_steps(experiment)
    normalize: Mapping[str, Any] = next((step for step in steps if step.get("type") == "Normalize"), {})
    window = experiment.model.test_cfg
    # squares are as large as the short side, and the model takes one size alone
    size = {"shortest_edge": int(window.crop_size[0])} if splits else _size(steps)
    config: dict[str, Any] = {
        "image_processor_type": processor,
        "do_resize": size is not None,
        **({"size": size} if size else {}),
        "resample": BILINEAR,
        "do_rescale": bool(normalize),
        "rescale_factor": 1 / LARGEST,
        "do_normalize": bool(normalize),
        "do_reduce_labels": any(step.get("reduce_zero_label") for step in steps_of(experiment.train)),
        "windows": {"mode": window.mode}
        | ({name: list(window[name]) for name in ("crop_size", "stride")} if window.mode == "slide" else {}),
    }
    if splits:
        config["do_split_image"] = True
    if normalize:
        # of RGB, which is what transformers reads
        loading = loading_step(experiment)
        turned = normalize.get("to_rgb", True)
        order = slice(None) if turned or not in_colour(loading) else slice(None, None, -1)
        config["image_mean"] = [value / LARGEST for value in normalize["mean"][order]]
        config["image_std"] = [value / LARGEST for value in normalize["std"][order]]
        if in_colour(loading) or (turned and len(normalize["mean"]) == 3):
            config["channels"] = "RGB" if turned else "BGR"
        else:
            config["channels"] = "of the file"
    return config


def loading_step(experiment: Experiment) -> Mapping[str, Any]:
    """The step of the test pipeline that loads images; empty where there is none."""
    return next(iter(_test_steps(experiment)), {})


def in_colour(step: Mapping[str, Any]) -> bool:
    """Whether a step loads 8-bit images in colour, which is all that transformers' image processors know of."""
    return step.get("type") == "LoadImageFromFile" and step.get("color_type", "color").startswith("color")


def _test_steps(experiment: Experiment) -> list[Mapping[str, Any]]:
    (test, *_) = leaf_datasets(experiment.test) if experiment.test is not None else ({},)
    return list(with_inner_steps(test.get("pipeline", ())))


def _size(steps: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """What an image is resized to, in the words of transformers; None where it is not."""
    scale = next((step["img_scale"] for step in steps if step.get("img_scale")), None)
    if scale is None:
        return None
    first = scale[0] if isinstance(scale[0], (list, tuple)) else scale
    width, height = int(first[0]), int(first[1])
    resizing = (step for step in steps if "Resize" in str(step.get("type")) and "keep_ratio" in step)
    if next(resizing, {"keep_ratio": True})["keep_ratio"]:
        return {"shortest_edge": min(width, height), "longest_edge": max(width, height)}
    return {"height": height, "width": width}
