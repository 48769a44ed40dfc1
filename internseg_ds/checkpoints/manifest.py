"""The note that a finished save leaves in its directory: `internseg_ds.json`, written last. Its presence says that every rank's file is on disk."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internseg_ds.errors import CheckpointError

MANIFEST = "internseg_ds.json"
KINDS = {"step": (int,), "number": (int,), "run": (str,), "saved_at": (float, int), "world_size": (int,), "files": (dict,), "meta": (dict,),
         "metrics": (dict,), "groups": (list,)}
"""What a note holds, as far as it is relied on."""


def write_manifest(directory: Path, *, step: int, world_size: int, zero_stage: int, meta: Mapping[str, Any], metrics: Mapping[str, float],
                   groups: Sequence[Mapping[str, Any]] = (), saved_at: float | None = None, node_local: bool = False, run: str = "", number: int = 0) -> None:
    """Records step, layout, meta (CLASSES, PALETTE, config text), metrics, parameter groups (names, lr, weight_decay) and the size of every other file in
    `directory`; atomic. saved_at: seconds since 1970, now if None. node_local: other hosts have written the files of their ranks into folders of their own.
    run: an identity that a run keeps when it is resumed; number: of this save in it."""
    files = {str(file.relative_to(directory)): file.stat().st_size for file in sorted(directory.rglob("*")) if file.is_file() and file.name != MANIFEST}
    _write(directory, {"format": 1, "run": run, "number": number, "step": step, "saved_at": time.time() if saved_at is None else saved_at,
                       "world_size": world_size, "zero_stage": zero_stage, "node_local": node_local, "files": files, "meta": dict(meta),
                       "metrics": dict(metrics), "groups": list(groups)})


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
        raise CheckpointError(f"{directory / MANIFEST} is damaged ({error}); take another checkpoint") from None
    for key, kind in KINDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(key, kind[0]()), kind):
            raise CheckpointError(f"{directory / MANIFEST} is damaged: it has no {key} as a save writes it; take another checkpoint")
    if trouble := _trouble_in(content):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: {trouble}; take another checkpoint")
    return content


def _trouble_in(content: Mapping[str, Any]) -> str | None:
    """What of a note's content no save writes."""
    def is_number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if "step" not in content:
        return "it has no step"
    for name, size in content.get("files", {}).items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name or not isinstance(size, int):
            return f"its files hold {name[:60]!r}: {size!r:.60}"
    for name, value in content.get("metrics", {}).items():
        if not is_number(value):
            return f"its metrics hold {name[:60]!r}: {value!r:.60}"
    for group in content.get("groups", []):
        if not (isinstance(group, dict) and isinstance(group.get("names"), list) and is_number(group.get("lr")) and is_number(group.get("weight_decay"))):
            return f"its groups hold {group!r:.60}"
    return None


def verify_manifest(directory: Path) -> None:
    """Raises CheckpointError when a file that the note names is missing or has another size."""
    for name, size in (read_manifest(directory) or {"files": {}})["files"].items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete; copy it again with all its files, or take another one")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size:,} bytes, its save wrote {size:,}: it is truncated; "
                                  "copy it again, or take another checkpoint")


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    temporary = directory / (MANIFEST + ".new")
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
