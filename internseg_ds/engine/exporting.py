"""The fine-tuned backbone alone, out of a ZeRO checkpoint, in the key layout of the weights that it started from: a .pth, or a Hugging Face folder.

What the layouts are is the backbone's own knowledge (`layouts`, `exported`); this module finds the backbone in the config that travels with the checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mmcv import Config

from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import CheckpointError


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
    """Writes the backbone of a checkpoint, without what is not part of its layout (heads, a ViT's FPN), to `out`: a .pth, or a folder where the layout has a
    config.json.

    Raises CheckpointError where `consolidate` does, when `out` is not of that kind, and when the checkpoint carries no config or its backbone has no such
    layout.
    """
    meta = ZeroCheckpoint.open(source, tag, check=check).manifest.get("meta", {})
    if not meta.get("config"):
        raise CheckpointError(
            f"{source} carries no config, so nothing says what its backbone is; only checkpoints of this engine can be exported"
        )
    backbone = build_on_meta(Config.fromstring(meta["config"], ".py").model).backbone
    if not (layouts := getattr(backbone, "layouts", ())):
        raise CheckpointError(
            f"backbone {type(backbone).__name__} has no published layout to be exported in; consolidate the whole segmentor"
        )
    if layout not in layouts:
        raise CheckpointError(
            f"backbone {type(backbone).__name__} has no layout {layout!r}; write --backbone {' or --backbone '.join(layouts)}"
        )
    names, config = backbone.exported(layout)
    if (config is None) != (Path(out).suffix == ".pth"):
        raise CheckpointError(
            f"{out}: the layout {layout!r} is {'one .pth' if config is None else 'a folder'}; write --backbone {layout} with such a name"
        )

    def select(entries: Mapping[str, Entry]) -> dict[str, Entry]:
        return {
            theirs: entry
            for ours, parts in names.items()
            if f"backbone.{ours}" in entries
            for theirs, entry in zip(parts, entries[f"backbone.{ours}"].split(len(parts)), strict=True)
        }

    files = (
        {}
        if config is None
        else {"config.json": json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n"}
    )
    return consolidate(
        source,
        out,
        dtype=dtype,
        tag=tag,
        ema=ema,
        overwrite=overwrite,
        select=select,
        files=files,
        bare=config is None,
        check=check,
    )
