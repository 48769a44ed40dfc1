"""A ZeRO checkpoint turned into one ordinary checkpoint: an mmseg .pth, one .safetensors, or a folder of sharded safetensors with an index.

Values are read from the shards, merged and written piece by piece (`streaming`), so that memory depends neither on the model's size nor on the number of
processes that saved it. DeepSpeed's own `zero_to_fp32` holds the model in memory for one file, and for ZeRO-1/2 in any form. The result appears under
its name only when it is complete, and `NAME.xxh128` beside it has its checksums.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from internseg_ds.checkpoints.stored import HeldTensor
from internseg_ds.checkpoints.streaming import Advance, Entry, write_pth, write_safetensors
from internseg_ds.checkpoints.sum_files import FileSummer, FileSums, sum_file, written_sums
from internseg_ds.checkpoints.weights import INDEX
from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.errors import CheckpointError, shortened

SHARD_BYTES = 4 * 2**30
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def consolidate(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tag: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    select: Callable[[Mapping[str, Entry]], dict[str, Entry]] = dict,
    files: Mapping[str, str] = {},
    bare: bool = False,
    check: bool = True,
) -> Path:
    """Writes the weights of a ZeRO checkpoint to `out` (*.pth, *.safetensors, or a folder) and returns it.

    source: WORK_DIR, WORK_DIR/checkpoints, or one save. tag: which save ("best", "iter_N"; default the latest). dtype: of the backbone's parameters;
    the rest stays float32. ema: the averaged weights. check: what is read is held against the checksums of its save. select: picks and renames what is
    written (default: all). files: texts that go into a folder, by name.
    The .pth is mmseg's: {"meta": {CLASSES, PALETTE, config, iter, metrics}, "state_dict": ...}, loadable with weights_only; bare: the state dict alone.

    Raises CheckpointError for a damaged source, an existing `out` (unless overwrite), and a target without enough space, before the first byte.
    """
    checkpoint, what = ZeroCheckpoint.open(source, tag, check=check), "ema" if ema else "fp32"
    checkpoint.check_holds(what)
    out = Path(out)
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another name, or give --overwrite")
    if out.is_dir():  # only what this function writes is ever deleted: `out` may be a work directory by mistake, even that of `source`
        strangers = [
            item.name
            for item in sorted(out.iterdir())
            if item.name not in (INDEX, *files) and not (item.is_file() and SHARD_NAME.fullmatch(item.name))
        ]
        if strangers:
            raise CheckpointError(
                f"{out} holds more than consolidated weights ({shortened(strangers)}) and is not overwritten; choose another name"
            )
    if out.suffix and out.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(
            f"{out} has an unknown ending; use .pth, .safetensors, or a folder name without an ending"
        )
    if out.is_file() and not out.suffix:
        raise CheckpointError(
            f"{out} is a file without an ending, none of ours, and is not overwritten; choose another name"
        )
    unfinished = out.with_name(out.name + ".partial")
    if unfinished.is_dir() and not all(
        item.name in (INDEX, *files) or SHARD_NAME.fullmatch(item.name) for item in unfinished.iterdir()
    ):
        raise CheckpointError(
            f"{unfinished} is in the way and holds more than a consolidation that was interrupted; move it, or choose another name"
        )
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {place} is no folder that this user may write to")
    entries = select(_entries(checkpoint, getattr(torch, dtype), what))
    total, free = sum(entry.nbytes for entry in entries.values()), shutil.disk_usage(place).free
    if total * 1.01 > free:
        raise CheckpointError(
            f"{out} needs {total / 2**30:.2f} GiB but only {free / 2**30:.2f} GiB are free in {place}; "
            "free some space, or choose another place"
        )
    metrics = checkpoint.manifest.get("metrics", {})
    meta = {
        **checkpoint.manifest.get("meta", {}),
        "iter": checkpoint.manifest.get("step"),
        "metrics": metrics,
        "mIoU": metrics.get("mIoU"),
    }

    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)
    doing = TextColumn(f"consolidating {checkpoint.path.name}, {len(entries)} tensors")
    with Progress(
        doing, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("", total=total)

        def advance(written: int) -> None:
            progress.advance(task, written)

        if out.suffix == ".pth":
            sums = {out.name: write_pth(unfinished, entries, None if bare else meta, advance)}
        elif out.suffix == ".safetensors":
            sums = {
                out.name: write_safetensors(
                    unfinished, entries, {"format": "pt", "meta": json.dumps(meta)}, advance
                )
            }
        else:
            sums = write_sharded(unfinished, entries, {"format": "pt", "meta": json.dumps(meta)}, advance)
            for name, text in files.items():
                (unfinished / name).write_text(text)
                sums[name] = _of_text(text)
            sums = {f"{out.name}/{name}": digest for name, digest in sums.items()}
    _publish(unfinished, out, sums)
    return out


def _entries(checkpoint: ZeroCheckpoint, dtype: torch.dtype, what: What) -> dict[str, Entry]:
    """Every parameter and buffer of the checkpoint; the backbone's parameters in `dtype`, the rest as it was computed, in fp32."""
    entries = {
        name: Entry(
            shape,
            dtype if name.startswith("backbone.") else torch.float32,
            partial(checkpoint.read_slice, name, what=what),
        )
        for name, shape in checkpoint.shapes.items()
    }
    return entries | {
        name: Entry(value.shape, value.dtype, HeldTensor(value).read_slice)
        for name, value in checkpoint.buffers.items()
    }


def write_sharded(
    folder: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], advance: Advance
) -> dict[str, FileSums]:
    """Safetensors of at most SHARD_BYTES (or one tensor) and transformers' index file; returns file name -> checksums."""
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in entries.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + entry.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = entry
    folder.mkdir()
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    sums = {
        file: write_safetensors(folder / file, shard, metadata, advance) for file, shard in zip(files, shards)
    }
    index = json.dumps(
        {
            "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
            "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
        },
        indent=1,
    )
    (folder / INDEX).write_text(index)
    return sums | {INDEX: _of_text(index)}


def _of_text(text: str) -> FileSums:
    summer = FileSummer()
    summer.update(text.encode())
    return summer.sums()


def _publish(unfinished: Path, out: Path, sums: Mapping[str, FileSums]) -> None:
    """Brings the result to disk, gives it its name, and notes its checksums beside it."""
    for file in unfinished.iterdir() if unfinished.is_dir() else [unfinished]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    note = sum_file(out).with_name(sum_file(out).name + ".partial")
    note.write_text(written_sums(sums))
    _remove(out)
    unfinished.rename(out)
    note.replace(sum_file(out))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
