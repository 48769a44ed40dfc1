"""The note that a finished save leaves in its directory: `internseg_ds.json`, written last. Its presence says
that every rank's file is on disk.

It says of each file how large it is, which rank wrote it, and the checksums of its blocks (`checksums`), and
has a checksum of its own.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from internseg_ds.checkpoints.checksums import (
    BLOCK,
    DIGEST,
    BlockSums,
    CheckedFile,
    Written,
    of_digests,
    of_zip,
)
from internseg_ds.errors import CheckpointError

MANIFEST = "internseg_ds.json"
KINDS = {
    "step": (int,),
    "number": (int,),
    "run": (str,),
    "saved_at": (float, int),
    "world_size": (int,),
    "files": (dict,),
    "meta": (dict,),
    "metrics": (dict,),
    "groups": (list,),
}
"""What a note holds, as far as it is relied on."""
FORMAT = 2
"""Of notes with checksums. Those of format 1 have the size alone of each file."""
SUM = "xxh128"


@dataclass(frozen=True)
class SaveRecord:
    """What a save records about itself and its run.

    meta: CLASSES, PALETTE, config text, and what else a resume compares. groups: parameter groups as dicts of
    names, lr, weight_decay.
    saved_at: seconds since 1970, the time of writing if None. node_local: other hosts have written the files
    of their ranks into folders of their own. run: an identity that a run keeps when it is resumed; number: of
    this save in it.
    """

    step: int
    world_size: int
    zero_stage: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    saved_at: float | None = None
    node_local: bool = False
    run: str = ""
    number: int = 0


def write_manifest(
    directory: Path, record: SaveRecord, written: Mapping[str, tuple[int, Written]] | None = None
) -> None:
    """Writes the record of a save, and size and checksums of every other file in `directory`; atomic.

    written: by name, the rank that wrote a file and what it wrote; other files are read for it. Raises
    OSError when a file on the disk is not as large as what was written.
    """
    files = {}
    for file in sorted(file for file in directory.rglob("*") if file.is_file() and file.name != MANIFEST):
        name = str(file.relative_to(directory))
        rank, sums = (written or {}).get(name) or (None, _read_again(file))
        if (size := file.stat().st_size) != sums.size:
            raise OSError(f"{file} has {size:,} bytes on the disk, {sums.size:,} were written")
        files[name] = {"size": size, "rank": rank, SUM: sums.digests}
    content = {each.name: getattr(record, each.name) for each in fields(record)}
    if record.saved_at is None:
        content["saved_at"] = time.time()
    _write(directory, {"format": FORMAT, "block": BLOCK, **content, "files": files})


def update_metrics(directory: Path, metrics: Mapping[str, float]) -> None:
    """Adds the scores of an evaluation to a finished save's note; atomic."""
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory} holds no {MANIFEST}")
    _write(directory, {**manifest, "metrics": dict(metrics)})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The note, or None where there is none. Raises CheckpointError when it is no note."""
    try:
        if (directory / MANIFEST).exists() and not (directory / MANIFEST).is_file():
            raise ValueError("it is no file")  # a pipe would be waited for
        content = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is damaged ({error}); take another checkpoint"
        ) from None
    if isinstance(content, dict) and (SUM in content or content.get("format", 1) != 1):
        expected = content.pop(SUM, None)
        if expected != (found := _sum_of(content)):
            raise CheckpointError(
                f"{directory / MANIFEST} is damaged: its checksum says {expected}, its content has {found}; "
                "take another checkpoint"
            )
    for key, kind in KINDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(key, kind[0]()), kind):
            raise CheckpointError(
                f"{directory / MANIFEST} is damaged: it has no {key} as a save writes it; take another "
                "checkpoint"
            )
    if trouble := _trouble_in(content):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: {trouble}; take another checkpoint")
    return content


def _trouble_in(content: Mapping[str, Any]) -> str | None:
    """What of a note's content no save writes."""

    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if "step" not in content:
        return "it has no step"
    for name, entry in content.get("files", {}).items():
        if (
            Path(name).is_absolute()
            or ".." in Path(name).parts
            or "\0" in name
            or not isinstance(_size(entry), int)
        ):
            return f"its files hold {name[:60]!r}: {entry!r:.60}"
    for name, value in content.get("metrics", {}).items():
        if not is_number(value):
            return f"its metrics hold {name[:60]!r}: {value!r:.60}"
    for group in content.get("groups", []):
        if not (
            isinstance(group, dict)
            and isinstance(group.get("names"), list)
            and is_number(group.get("lr"))
            and is_number(group.get("weight_decay"))
        ):
            return f"its groups hold {group!r:.60}"
    return None


def verify_manifest(directory: Path) -> None:
    """Raises CheckpointError when a file that the note names is missing or has another size."""
    for name, entry in (read_manifest(directory) or {"files": {}}).get("files", {}).items():
        file, size = directory / name, _size(entry)
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing: the checkpoint is incomplete; copy it again with all its files, or "
                "take another one"
            )
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file} has {file.stat().st_size:,} bytes, its save wrote {size:,}: it is truncated; "
                "copy it again, or take another checkpoint"
            )


def checked_files(directory: Path, manifest: Mapping[str, Any]) -> dict[str, CheckedFile]:
    """The files of a save, by name, held against the checksums of its note, or, where that has none (of plain
    DeepSpeed, or an older one), against those in their own archives. Raises CheckpointError when one is
    damaged where it says what is in it."""
    found = {}
    for name, entry in manifest.get("files", {}).items():
        if isinstance(entry, dict) and isinstance(entry.get(SUM), str):
            block = manifest.get("block", BLOCK)
            if len(entry[SUM]) != DIGEST * -(-entry["size"] // block):
                raise CheckpointError(
                    f"{directory / MANIFEST} is damaged: {name} has checksums for another size; take "
                    "another checkpoint"
                )
            found[name] = of_digests(directory / name, entry["size"], entry[SUM], MANIFEST, block)
    for file in sorted(directory.glob("*.pt")):
        if file.name not in found and (checked := of_zip(file)) is not None:
            found[file.name] = checked
    return found


def _size(entry: Any) -> Any:
    """Of a file, by its entry of either format."""
    return entry.get("size") if isinstance(entry, dict) else entry


def _read_again(file: Path) -> Written:
    sums, room = BlockSums(), memoryview(bytearray(BLOCK))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(room):
            sums.update(room[:count])
    return Written(sums.size, sums.hexdigests())


def _sum_of(content: Mapping[str, Any]) -> str:
    """Of a note without its own checksum, whatever the order and the spaces in its file."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    content = json.loads(json.dumps(content))  # as it will be read
    temporary = directory / (MANIFEST + ".new")
    with temporary.open("w") as file:
        json.dump({**content, SUM: _sum_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
