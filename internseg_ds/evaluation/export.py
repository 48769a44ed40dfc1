"""The fine-tuned backbone alone, out of a ZeRO checkpoint, in the key layout of the weights that it started
from: a .pth, or a Hugging Face folder.

The layouts are defined by the backbone itself (`layouts`, `exported`); this module builds it, on the meta
device, from the config that is stored in the checkpoint. It runs in one process and loads no model.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmcv import Config
from torch import nn

from internseg_ds.checkpoints.consolidate import Layout, consolidate
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import CheckpointError
from internseg_ds.tensor_part import Part


def export_backbone(
    source: Path,
    out: Path,
    layout: str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tag: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> Path:
    """Write the backbone of a checkpoint, without what is not part of its layout (heads, a ViT's FPN), to
    `out`: a .pth, or a folder where the layout has a config.json.

    Arguments other than layout are those of `consolidate`. Raises CheckpointError where `consolidate` does,
    when `out` is not of that kind, and when the checkpoint has no config or its backbone has no such layout.
    """
    backbone: Any = _backbone_in(source, tag, check=check)
    layouts: tuple[str, ...] = getattr(backbone, "layouts", ())
    if not layouts:
        raise CheckpointError(
            f"backbone {type(backbone).__name__} has no published layout to be exported in; consolidate "
            "the whole segmentor"
        )
    if layout not in layouts:
        raise CheckpointError(
            f"backbone {type(backbone).__name__} has no layout {layout!r}; write --backbone "
            f"{' or --backbone '.join(layouts)}"
        )
    names, config = backbone.exported(layout)
    if (config is None) != (Path(out).suffix == ".pth"):
        raise CheckpointError(
            f"{out}: the layout {layout!r} is {'one .pth' if config is None else 'a folder'}; write "
            f"--backbone {layout} with such a name"
        )
    files = {}
    if config is not None:
        files["config.json"] = json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n"
    return consolidate(
        source,
        out,
        dtype=dtype,
        tag=tag,
        ema=ema,
        overwrite=overwrite,
        check=check,
        layout=Layout(partial(renamed_entries, names), files, bare=config is None),
    )


def _backbone_in(source: Path, tag: str | None, *, check: bool) -> nn.Module:
    """The backbone that a checkpoint is of, on the meta device."""
    meta = ZeroCheckpoint.open(source, tag, check=check).manifest.get("meta", {})
    if not meta.get("config"):
        raise CheckpointError(
            f"{source} carries no config, so nothing says what its backbone is; only checkpoints of this "
            "engine can be exported"
        )
    segmentor: Any = build_on_meta(Config.fromstring(meta["config"], ".py").model)
    return segmentor.backbone


def renamed_entries(
    names: Mapping[str, tuple[str | Part, ...]], entries: Mapping[str, Entry], prefix: str = "backbone."
) -> dict[str, Entry]:
    """The backbone's entries by the keys of a layout, or those of all modules whose names have `prefix`. names: our
    name behind that -> their keys, into which the tensor is split along its first dimension, or the part of theirs
    that it is."""
    found: dict[str, Entry] = {}
    parts: dict[str, dict[int, Entry]] = {}
    for ours, keys in names.items():
        if (entry := entries.get(prefix + ours)) is None:
            continue
        for theirs, piece in zip(keys, entry.split(len(keys)), strict=True):
            if isinstance(theirs, Part):
                parts.setdefault(theirs.key, {})[theirs.index] = piece
            else:
                found[theirs] = piece
    joined = {theirs: Entry.joined([of[index] for index in sorted(of)]) for theirs, of in parts.items()}
    return found | joined
