"""A ZeRO checkpoint turned into one ordinary checkpoint: an mmseg .pth, one .safetensors, or a folder of
sharded safetensors with an index.

Values are read from the shards, merged and written piece by piece (`streaming`), so that memory depends
neither on the model's size nor on the number of processes that saved it. DeepSpeed's own `zero_to_fp32` holds
the model in memory for one file, and for ZeRO-1/2 in any form. The result appears under its name only when it
is complete, and `NAME.xxh128` beside it has its checksums.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from internseg_ds.checkpoints.checksum_files import FileSummer, FileSums, sum_file, written_sums
from internseg_ds.checkpoints.merged_checkpoint import MergedCheckpoint, merged
from internseg_ds.checkpoints.stored_tensors import HeldTensor
from internseg_ds.checkpoints.streaming import Advance, Entry, write_pth, write_safetensors
from internseg_ds.checkpoints.weights import INDEX
from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.errors import CheckpointError, counted, shortened
from internseg_ds.progress import BYTES, progress

SHARD_BYTES = 4 * 2**30
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Layout:
    """What a result holds, and by which names. select: picks and renames what is written (default: all).
    files: texts and pictures that go into a folder of safetensors, by name. bare: a .pth is the state dict alone,
    without mmseg's `meta`. merged: low-rank adapters are. single: a folder's only weight file, in place of shards.
    owned: names of files that another result of this kind may have, which are replaced with it."""

    select: Callable[[Mapping[str, Entry]], dict[str, Entry]] = dict
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    bare: bool = False
    merged: bool = True
    single: str | None = None
    owned: tuple[str, ...] = ()

    @property
    def file_names(self) -> tuple[str, ...]:
        """Of a folder that is written or replaced, beside shards and their index."""
        return (*self.files, *self.owned, *((self.single,) if self.single else ()))


def consolidate(
    source: Path,
    out: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    tag: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    check: bool = True,
    layout: Layout | None = None,
) -> Path:
    """Writes the weights of a ZeRO checkpoint to `out` (*.pth, *.safetensors, or a folder) and returns it.

    source: WORK_DIR, WORK_DIR/checkpoints, or one save. tag: which save ("best", "iter_N"; default the
    latest). dtype: of the backbone's parameters; the rest stays float32. ema: the averaged weights. check:
    what is read is held against the checksums of its save. layout: default the whole segmentor under its own
    names, with low-rank adapters merged into its weights. The .pth is mmseg's: {"meta": {CLASSES, PALETTE,
    config, iter, metrics}, "state_dict": ...}, loadable with weights_only.

    Raises CheckpointError for a damaged source, an existing `out` (unless overwrite), and a target without
    enough space, before the first byte.
    """
    layout = layout or Layout()
    what: What = "ema" if ema else "fp32"
    checkpoint = ZeroCheckpoint.open(source, tag, check=check)
    checkpoint.check_holds(what)
    out = Path(out)
    unfinished = out.with_name(out.name + ".partial")
    place = _check_target(out, unfinished, layout.file_names, overwrite)
    read = merged(checkpoint) if layout.merged else checkpoint
    entries = layout.select(_entries(read, getattr(torch, dtype), what))
    total = sum(entry.nbytes for entry in entries.values())
    _check_space(out, place, total)

    out.parent.mkdir(parents=True, exist_ok=True)
    _remove(unfinished)
    doing = f"consolidating {checkpoint.path.name}, {counted(len(entries), 'tensor')}"
    with progress(doing, total, BYTES) as written:
        sums = _write(out, unfinished, entries, _meta(checkpoint), layout, written.advance)
    _publish(unfinished, out, sums)
    return out


def _check_target(out: Path, unfinished: Path, files: Collection[str], overwrite: bool) -> Path:
    """The folder that exists already under which `out` comes to lie. Raises CheckpointError where `out`
    cannot be written, or something would be lost.

    Only what this module writes is ever deleted: `out` may be a work directory by mistake, even that of the
    checkpoint.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists already; choose another name, or give --overwrite")
    if others := _not_ours(out, files):
        raise CheckpointError(
            f"{out} holds more than consolidated weights ({shortened(others)}) and is not "
            "overwritten; choose another name"
        )
    if out.suffix and out.suffix not in (".pth", ".safetensors"):
        raise CheckpointError(
            f"{out} has an unknown ending; use .pth, .safetensors, or a folder name without an ending"
        )
    if out.is_file() and not out.suffix:
        raise CheckpointError(
            f"{out} is a file without an ending, none of ours, and is not overwritten; choose another name"
        )
    if _not_ours(unfinished, files):
        raise CheckpointError(
            f"{unfinished} is in the way and holds more than a consolidation that was interrupted; move "
            "it, or choose another name"
        )
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise CheckpointError(f"{out} cannot be written: {place} is no folder that this user may write to")
    return place


def _not_ours(folder: Path, files: Collection[str]) -> list[str]:
    """The names in a folder that no consolidation writes; none where it is no folder."""
    if not folder.is_dir():
        return []
    return [
        item.name
        for item in sorted(folder.iterdir())
        if item.name not in (INDEX, *files) and not (item.is_file() and SHARD_NAME.fullmatch(item.name))
    ]


def _check_space(out: Path, place: Path, needed: int) -> None:
    """needed: in bytes. Raises CheckpointError where the disk of `place` has less, and 1 % for headers."""
    free = shutil.disk_usage(place).free
    if needed * 1.01 > free:
        raise CheckpointError(
            f"{out} needs {needed / 2**30:.2f} GiB but only {free / 2**30:.2f} GiB are free in {place}; "
            "free some space, or choose another place"
        )


def _meta(checkpoint: ZeroCheckpoint) -> dict[str, Any]:
    """mmseg's `meta` of a checkpoint."""
    metrics = checkpoint.manifest.get("metrics", {})
    return {
        **checkpoint.manifest.get("meta", {}),
        "iter": checkpoint.manifest.get("step"),
        "metrics": metrics,
        "mIoU": metrics.get("mIoU"),
    }


def _write(
    out: Path,
    unfinished: Path,
    entries: Mapping[str, Entry],
    meta: Mapping[str, Any],
    layout: Layout,
    advance: Advance,
) -> dict[str, FileSums]:
    """Writes the weights to `unfinished` in the format of `out`; returns the checksums as the sum file of
    `out` has them."""
    if out.suffix == ".pth":
        return {out.name: write_pth(unfinished, entries, None if layout.bare else meta, advance)}
    metadata = {"format": "pt", "meta": json.dumps(meta)}
    if out.suffix == ".safetensors":
        return {out.name: write_safetensors(unfinished, entries, metadata, advance)}
    if layout.single:
        unfinished.mkdir()
        file = layout.single
        sums = {file: write_safetensors(unfinished / file, entries, metadata, advance)}
    else:
        sums = write_sharded(unfinished, entries, metadata, advance)
    for name, content in layout.files.items():
        content = content.encode() if isinstance(content, str) else content
        (unfinished / name).write_bytes(content)
        sums[name] = _of_bytes(content)
    return {f"{out.name}/{name}": digest for name, digest in sums.items()}


def _entries(
    checkpoint: ZeroCheckpoint | MergedCheckpoint, dtype: torch.dtype, what: What
) -> dict[str, Entry]:
    """Every parameter and buffer of the checkpoint; the backbone's parameters in `dtype`, the rest as it was
    computed, in fp32."""
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
    """Safetensors of at most SHARD_BYTES (or one tensor) and transformers' index file; returns file name ->
    checksums."""
    shards = _in_shards(entries)
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
    return sums | {INDEX: _of_bytes(index.encode())}


def _in_shards(entries: Mapping[str, Entry]) -> list[dict[str, Entry]]:
    """The entries in their order, cut where a shard would get larger than SHARD_BYTES."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _of_bytes(content: bytes) -> FileSums:
    summer = FileSummer()
    summer.update(content)
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
