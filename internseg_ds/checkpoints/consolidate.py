"""A ZeRO checkpoint turned into one ordinary checkpoint: an mmseg .pth, one .safetensors, or a folder of sharded safetensors with an index.

Tensors are merged from memory-mapped shards. Sharded safetensors are written shard by shard; the one-file forms are held in memory whole before they
are written. The result appears under its name only when it is complete, and `NAME.sha256` beside it has its checksums.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from internseg_ds.checkpoints.fitting import shortened
from internseg_ds.checkpoints.weights import INDEX
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.errors import CheckpointError

SHARD_BYTES = 4 * 2**30
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def consolidate(source: Path, out: Path, *, dtype: Literal["float32", "bfloat16"] = "float32", tag: str | None = None, overwrite: bool = False) -> Path:
    """Writes the weights of a ZeRO checkpoint to `out` (*.pth, *.safetensors, or a folder) and returns it.

    source: WORK_DIR, WORK_DIR/checkpoints, or one save. tag: which save ("best", "iter_N"; default the latest). dtype: of the backbone's parameters;
    the rest stays float32. The .pth is mmseg's: {"meta": {CLASSES, PALETTE, config, iter, metrics}, "state_dict": ...}, loadable with weights_only.

    Raises CheckpointError for a damaged source, an existing `out` (unless overwrite), and a target without enough space, before the first byte.
    """
    checkpoint = ZeroCheckpoint.open(source, tag)
    out = Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another name, or give --overwrite")
    if out.is_dir():  # only what this function writes is ever deleted: `out` may be a work directory by mistake, even that of `source`
        strangers = [item.name for item in sorted(out.iterdir()) if item.name != INDEX and not (item.is_file() and SHARD_NAME.fullmatch(item.name))]
        if strangers:
            raise CheckpointError(f"{out} holds more than consolidated weights ({shortened(strangers)}) and is not overwritten; choose another name")
    if out.suffix and out.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(f"{out} has an unknown ending; use .pth, .safetensors, or a folder name without an ending")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {place} is no folder that this user may write to")
    wanted = getattr(torch, dtype)
    sizes = {name: shape.numel() * (wanted.itemsize if name.startswith("backbone.") else 4) for name, shape in checkpoint.shapes.items()}
    sizes |= {name: buffer.nbytes for name, buffer in checkpoint.buffers.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(place).free
    if total * 1.01 > free:
        raise CheckpointError(f"{out} needs {total / 2**30:.2f} GiB but only {free / 2**30:.2f} GiB are free in {place}; free some space, or choose another place")
    metrics = checkpoint.manifest.get("metrics", {})
    meta = {**checkpoint.manifest.get("meta", {}), "iter": checkpoint.manifest.get("step"), "metrics": metrics, "mIoU": metrics.get("mIoU")}

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    _remove(partial)
    with Progress(TextColumn("consolidating"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=total)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in checkpoint.shapes:
                value = checkpoint.read(name)
                yield name, value.to(wanted) if name.startswith("backbone.") else value
                progress.advance(task, sizes[name])
            yield from checkpoint.buffers.items()

        if out.suffix == ".pth":
            torch.save({"meta": meta, "state_dict": dict(tensors())}, partial)
        elif out.suffix == ".safetensors":
            save_file({name: value.contiguous() for name, value in tensors()}, partial, {"format": "pt", "meta": json.dumps(meta)})
        else:
            _save_sharded(tensors(), sizes, partial, json.dumps(meta))
    _publish(partial, out)
    return out


def _save_sharded(tensors: Iterator[tuple[str, Tensor]], sizes: dict[str, int], folder: Path, meta: str) -> None:
    """Shards of at most SHARD_BYTES (or one tensor), and transformers' index file."""
    plan: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if plan[-1] and filled + size > SHARD_BYTES:
            plan.append([])
            filled = 0
        plan[-1].append(name)
        filled += size
    folder.mkdir()
    weight_map = {}
    for number, names in enumerate(plan, start=1):
        file = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        save_file({name: value.contiguous() for name, value in (next(tensors) for _ in names)}, folder / file, {"format": "pt", "meta": meta})
        weight_map |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=1))


def _publish(partial: Path, out: Path) -> None:
    """Brings the result to disk, notes its checksums, and gives it its name."""
    files = sorted(partial.iterdir()) if partial.is_dir() else [partial]
    lines = []
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        lines.append(f"{digest}  {out.name}{'/' + file.name if partial.is_dir() else ''}\n")
    _remove(out)
    partial.rename(out)
    out.with_name(out.name + ".sha256").write_text("".join(lines))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
