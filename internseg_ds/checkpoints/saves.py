"""The saves of a checkpoints folder: which are complete, in which order, what its pointers name, and how one
is taken away.

In: a folder of `iter_N/` directories and the small files `latest` and `best` beside them. A neighbour that is
damaged, or that cannot be removed, is a warning: it shall cost neither a training nor a resume. Names that
lead out of the folder are not followed.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from internseg_ds.checkpoints.manifest import MANIFEST, read_manifest
from internseg_ds.errors import CheckpointError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""The end of the names of what is being written, or taken away."""
SAVE = re.compile(r"iter_\d+")
"""The name of a save; other names that begin so are somebody's copies."""
LONGEST = 255
"""Bytes of a pointer that are read."""


def present_saves(folder: Path) -> list[Path]:
    """All that may be a save in a folder, whether or not its note can be read: directories `iter_N` that hold
    anything, and what `latest` names. For what must not be overwritten."""
    found = [path for path in folder.glob("iter_*") if SAVE.fullmatch(path.name) and path.is_dir()]
    if (latest := pointed_to(folder, "latest")) is not None and (folder / latest) not in found:
        found.append(folder / latest)
    return sorted(path for path in found if path.is_dir() and any(path.iterdir()))


def complete_saves(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, the newest last."""
    return [path for path, _ in noted_saves(folder)]


def noted_saves(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The same with their notes, each read once. Their order is that of the numbers that a run gives its
    saves, and not of a clock, which may go back."""
    found = []
    for note in folder.glob(f"iter_*/{MANIFEST}"):
        if SAVE.fullmatch(note.parent.name):
            try:
                manifest = read_manifest(note.parent) or {}
            except (CheckpointError, OSError) as error:
                log.warning("%s is passed over: %s", note.parent, error)
                continue
            found.append((note.parent, manifest))
    return sorted(found, key=lambda save: (*place_of(save[1]), save[0]))


def place_of(manifest: Mapping[str, Any]) -> tuple[int, float]:
    """By which saves are ordered: the number, and for those of before there were numbers the time."""
    return manifest.get("number", 0), manifest.get("saved_at", 0.0)


def named_by(pointer: Path) -> str:
    """The name that a pointer file (`latest`, `best`) holds: of a neighbour. Raises CheckpointError where it
    holds none, or a way out of the folder."""
    try:
        if pointer.exists() and not pointer.is_file():
            raise OSError("it is no file")  # a pipe would be waited for
        with pointer.open("rb") as file:
            name = file.read(LONGEST + 1).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{pointer} cannot be read ({error}); write the name of a checkpoint into it, or remove it"
        ) from None
    if (
        not name
        or len(name) > LONGEST
        or name != Path(name).name
        or name in (".", "..")
        or not name.isprintable()
    ):
        raise CheckpointError(
            f"{pointer} holds {name[:60]!r}, which is no name of a checkpoint beside it; write one into "
            "it, or remove it"
        )
    return name


def pointed_to(folder: Path, pointer: str) -> str | None:
    """The name that a pointer of `folder` holds; None, with a warning where it is damaged, when there is
    none."""
    if not os.path.lexists(folder / pointer):
        return None
    try:
        return named_by(folder / pointer)
    except CheckpointError as error:
        log.warning("%s", error)
        return None


def publish(pointer: Path, tag: str) -> None:
    """Makes the pointer file name `tag`, at once or not at all."""
    temporary = pointer.with_suffix(".new")
    temporary.write_text(tag)
    to_disk(temporary)
    os.replace(temporary, pointer)
    to_disk(pointer.parent)


def take_name(partial: Path, final: Path, replaced: Path) -> None:
    """Renames a save that is whole; one that has its name already is `replaced` then. Raises OSError, and all
    is as it was."""
    if os.path.lexists(final):
        final.rename(replaced)  # a resumed run comes to this step again
    try:
        partial.rename(final)
    except OSError:
        give_name_back(None, replaced)
        raise


def give_name_back(final: Path | None, replaced: Path) -> None:
    """Takes back what `take_name` did. final: the save that has the name now, None for none."""
    with suppress(OSError):  # of a disk that gives trouble already
        if final is not None:
            final.rename(final.with_name(final.name + PARTIAL))
        if os.path.lexists(replaced):
            replaced.rename(replaced.with_name(replaced.name.removesuffix(".replaced" + PARTIAL)))


def remove(path: Path) -> None:
    """Takes a save away: out of sight at once, then off the disk. What cannot be removed is a warning, and is
    tried again by `sweep`."""
    aside = path if path.name.endswith(PARTIAL) else path.with_name(f"{path.name}.removed{PARTIAL}")
    try:
        if aside != path:
            path.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s; the next save tries again", aside, error.strerror or error)


def sweep(folder: Path) -> None:
    """Takes away what interrupted saves and removals have left."""
    for leftover in folder.glob("*" + PARTIAL):
        remove(leftover)


def all_to_disk(folder: Path) -> None:
    """Brings the files of a folder to disk."""
    for file in folder.iterdir():
        to_disk(file)


def to_disk(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
