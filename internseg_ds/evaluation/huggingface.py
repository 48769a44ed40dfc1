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
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import CheckpointError, shortened
from internseg_ds.evaluation.export import renamed_entries
from internseg_ds.evaluation.model_card import CONFUSION, PICTURE, model_card, record_of
from internseg_ds.evaluation.preprocessor import preprocessor_config
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
    usage = usage_of(found, out.name, bgr=processing.get("channels") == "BGR")
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


def usage_of(found: SegmentorFormat, name: str, *, bgr: bool) -> str:
    """Python that loads the folder and segments an image. bgr: as the model takes the channels."""
    trusting = ", trust_remote_code=True" if found.code else ""
    code = f"""
import torch
from PIL import Image
from transformers import AutoImageProcessor, {found.loader}

processor = AutoImageProcessor.from_pretrained("{name}")
model = {found.loader}.from_pretrained("{name}"{trusting}).eval()
image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=image, return_tensors="pt")
"""
    size = "target_sizes=[(image.height, image.width)]"
    if bgr:
        code += 'inputs["pixel_values"] = inputs["pixel_values"].flip(1)  # RGB -> BGR\n'
    if found.splits_images:
        code += f"""offsets = inputs.pop("patch_offsets")
with torch.no_grad():
    outputs = model(**inputs)
outputs.patch_offsets = offsets
labels = processor.post_process_semantic_segmentation(outputs, {size})[0]
"""
    else:
        code += f"""with torch.no_grad():
    outputs = model(**inputs)
labels = processor.post_process_semantic_segmentation(outputs, {size})[0]
"""
    return (
        code
        + f"""
# or, with internseg_ds installed, in the windows and with the resizing of the training:
from internseg_ds import Segmenter

labels = Segmenter.from_pretrained("{name}")("image.jpg").labels
"""
    )
