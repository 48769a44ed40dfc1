"""A trained segmentor as a folder that transformers loads, and such a folder read again.

Out of a ZeRO checkpoint: config.json with the names and colours of the classes, sharded safetensors,
preprocessor_config.json, a model card, the training's config, and code where transformers has no such class. What
loads a segmentor is the models' business (`models.huggingface`). It runs in one process and loads no model.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from mmcv import Config
from torch import Tensor, nn

from internseg_ds.checkpoints.consolidate import Layout, consolidate
from internseg_ds.checkpoints.stored_tensors import HeldTensor
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.weights import Weights, renamed
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.data.checks.pipeline_steps import READ_RASTERS
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import CheckpointError, shortened
from internseg_ds.evaluation.export import renamed_entries
from internseg_ds.evaluation.model_card import CONFUSION, PICTURE, model_card, record_of
from internseg_ds.evaluation.preprocessor import in_colour, loading_step, preprocessor_config
from internseg_ds.models.huggingface.formats import CODE_FILES, segmentor_format
from internseg_ds.models.huggingface.segmentor_format import SegmentorFormat
from internseg_ds.tensor_part import Part

TRAINING_CONFIG = "training_config.py"


def export_huggingface(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tag: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Write the segmentor of a checkpoint to the folder `out`, without its auxiliary heads.

    Arguments are those of `consolidate`. Raises CheckpointError where that does, for an `out` with an ending, a
    checkpoint without a config, and a segmentor that transformers cannot load.
    """
    out = Path(out)
    if out.suffix:
        raise CheckpointError(f"{out}: a model for transformers is a folder, whose name has no ending")
    checkpoint = ZeroCheckpoint.open(source, tag, check=check)
    manifest = checkpoint.manifest
    experiment = stored_experiment(manifest.get("meta", {}), source)
    segmentor = build_on_meta(experiment.model)
    try:
        found = segmentor_format(segmentor)
    except ValueError as error:
        raise CheckpointError(
            f"{source} cannot be written for transformers: {error}; write a .pth, or the backbone alone with --backbone"
        ) from None
    meta = manifest["meta"]
    classes = _named(meta.get("CLASSES") or (), segmentor)
    record = record_of(checkpoint.path, manifest, experiment.engine.global_batch)
    processing = preprocessor_config(experiment, found.processor, splits=found.splits_images)
    processing |= found.processor_fields
    usage = usage_of(found, out.name, experiment, processing)
    config = found.config | _of_classes(classes, meta.get("PALETTE")) | {"dtype": dtype}
    files: dict[str, str | bytes] = {
        "config.json": _json(config),
        "preprocessor_config.json": _json(processing),
        TRAINING_CONFIG: meta["config"],
        "README.md": model_card(out.name, experiment, manifest, record, classes, usage),
        **record.pictures,
        **{code.name: code.read_text() for code in found.code},
    }
    return consolidate(
        source,
        out,
        dtype=dtype,
        tag=tag,
        ema=ema,
        overwrite=overwrite,
        check=check,
        layout=Layout(partial(_entries, found), files, owned=(PICTURE, CONFUSION, *CODE_FILES)),
    )


def stored_experiment(meta: Mapping[str, Any], source: Path) -> Experiment:
    """The experiment whose config is stored beside weights. Raises CheckpointError where there is none."""
    if not meta.get("config"):
        raise CheckpointError(
            f"{source} carries no config, so nothing says what its model is; only checkpoints of this engine, and what "
            "is written from them, do"
        )
    # without the name of the temporary file that mmcv reads it from
    return read_experiment(Config(Config.fromstring(meta["config"], ".py").to_dict()))


def without_auxiliary_heads(experiment: Experiment) -> Experiment:
    """The experiment with the segmentor that a folder holds."""
    cfg = Config(experiment.cfg.to_dict())
    cfg.model.pop("auxiliary_head", None)
    return read_experiment(cfg)


def from_folder(weights: Weights, segmentor: nn.Module) -> Weights:
    """The weights of a folder that `export_huggingface` has written, by the segmentor's own names. segmentor: on the
    meta device, without auxiliary heads.

    Raises CheckpointError where the folder lacks some, or its config is not one of a folder of that kind.
    """
    try:
        found = segmentor_format(segmentor)
    except ValueError as error:
        raise CheckpointError(f"{weights.path} is no folder of this segmentor: {error}") from None
    keys = {
        part.key if isinstance(part, Part) else part for parts in found.sources.values() for part in parts
    }
    if lacking := sorted(keys - weights.shapes.keys()):
        raise CheckpointError(
            f"{weights.path} lacks {shortened(lacking)}; it is no folder that launch/consolidate.py --format "
            "huggingface has written from this config, or not all of it"
        )
    shapes = {name: value.shape for name, value in segmentor.state_dict().items()}
    return _with_zeros(renamed(weights, found.sources), {name: shapes[name] for name in found.unused})


def _with_zeros(weights: Weights, added: Mapping[str, torch.Size]) -> Weights:
    """A view of `weights` with further names, whose values are zeros."""

    def read(name: str) -> Tensor:
        return torch.zeros(added[name]) if name in added else weights.read(name)

    def read_slice(name: str, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start) if name in added else weights.read_slice(name, start, stop)

    return dataclasses.replace(weights, shapes={**weights.shapes, **added}, read=read, read_slice=read_slice)


def _entries(found: SegmentorFormat, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    constants = {
        key: Entry(value.shape, value.dtype, HeldTensor(value).read_slice)
        for key, value in found.constants.items()
    }
    return renamed_entries(found.sources, entries, prefix="") | constants


def _named(classes: Any, segmentor: Any) -> list[str]:
    """A name for each output of the segmentor."""
    names = [str(name) for name in classes][: segmentor.out_channels]
    return names + [f"output {index}" for index in range(len(names), segmentor.out_channels)]


def _of_classes(classes: list[str], palette: Any) -> dict[str, Any]:
    return {
        "id2label": {str(index): name.strip() for index, name in enumerate(classes)},
        "label2id": {name.strip(): index for index, name in enumerate(classes)},
        "palette": palette,
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def usage_of(found: SegmentorFormat, name: str, experiment: Experiment, processing: Mapping[str, Any]) -> str:
    """Python that loads the folder and segments an image. processing: of preprocessor_config.json.

    Of images that transformers' processors do not prepare, it reads and normalises them itself, as far as a few lines
    can."""
    step = loading_step(experiment)
    if in_colour(step):
        code, image = _of_processor(found, name, bgr=processing.get("channels") == "BGR"), "image.jpg"
    else:
        code, image = _of_reading(found, name, step, processing), "image.tif"
    return f"""{code}
# {"or, with" if code else "with"} internseg_ds installed, in the windows and with the resizing of the training:
from internseg_ds import Segmenter

labels = Segmenter.from_pretrained("{name}")("{image}").labels
"""


def _loading(found: SegmentorFormat, name: str) -> str:
    trusting = ", trust_remote_code=True" if found.code else ""
    return f"""
processor = AutoImageProcessor.from_pretrained("{name}")
model = {found.loader}.from_pretrained("{name}"{trusting}).eval()
"""


def _of_processor(found: SegmentorFormat, name: str, *, bgr: bool) -> str:
    """bgr: as the model takes the channels."""
    code = f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, {found.loader}
{_loading(found, name)}image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=image, return_tensors="pt")
"""
    if bgr:
        code += 'inputs["pixel_values"] = inputs["pixel_values"].flip(1)  # RGB -> BGR\n'
    if found.splits_images:
        code += 'offsets = inputs.pop("patch_offsets")\n'
    code += "with torch.no_grad():\n    outputs = model(**inputs)\n"
    if found.splits_images:
        code += "outputs.patch_offsets = offsets\n"
    size = "[(image.height, image.width)]"
    return f"{code}labels = processor.post_process_semantic_segmentation(outputs, target_sizes={size})[0]\n"


def _of_reading(
    found: SegmentorFormat, name: str, step: Mapping[str, Any], processing: Mapping[str, Any]
) -> str:
    """The same of images that are no 8-bit RGB; "" where that takes more than some lines."""
    reading = _reading(step)
    if reading is None or found.splits_images or processing["do_resize"]:
        return ""
    package, lines = reading
    if processing.get("channels") == "RGB":
        lines += "\nimage = image[::-1].copy()  # as OpenCV reads it, BGR -> RGB"
    values = "torch.from_numpy(image)"
    if processing["do_normalize"]:
        lines += (
            "\nmean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (processor.image_mean, "
            "processor.image_std))"
        )
        values = f"({values} * processor.rescale_factor - mean) / std"
    return f"""
import {package}
import numpy as np
import torch
from transformers import AutoImageProcessor, {found.loader}
{_loading(found, name)}{lines}
pixel_values = ({values})[None]
with torch.no_grad():
    outputs = model(pixel_values)
labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[1:]])[0]
"""


def _reading(step: Mapping[str, Any]) -> tuple[str, str] | None:
    """(package, lines that read `image`, (channels, h, w) float32) as a step does; None for one of the user's own."""
    if step.get("type") in READ_RASTERS:
        channels = list(step["channels"]) if step.get("channels") else "raster.indexes"
        return (
            "rasterio",
            f"""with rasterio.open("image.tif") as raster:
    channels, nodata = {channels}, raster.nodatavals
    image = raster.read(channels).astype(np.float32)
for values, channel in zip(image, channels):
    values[~np.isfinite(values) | (values == nodata[channel - 1])] = {step.get("nodata", 0)}""",
        )
    flag = {"unchanged": "cv2.IMREAD_UNCHANGED", "grayscale": "cv2.IMREAD_GRAYSCALE"}.get(
        step.get("color_type", "")
    )
    if (
        step.get("type") != "LoadImageFromFile"
        or step.get("imdecode_backend", "cv2") != "cv2"
        or flag is None
    ):
        return None
    return (
        "cv2",
        f"""image = cv2.imread("image.tif", {flag})
image = image.reshape(*image.shape[:2], -1).transpose(2, 0, 1).astype(np.float32)  # (channels, h, w)""",
    )
