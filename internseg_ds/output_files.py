"""Result files that are whole or not there: pictures, tables and arrays get their names when their last byte
is written."""

import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from internseg_ds.errors import CheckpointError, ConfigError, OutputError

log = logging.getLogger(__name__)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` at the end of the block. Raises OutputError where the disk is
    full or the place is taken."""
    with whole_path(path) as partial, partial.open("wb") as file:
        yield file


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """The path of a file to write, beside `path` and hidden, which becomes `path` at the end of the block; where `path`
    is a link, what it leads to. Raises OutputError where the disk is full or the place is taken, be it by a device;
    whatever ends the block early, the file is removed."""
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OutputError(f"{path} cannot be written: it is there, and no file; choose another name")
    partial = target.with_name(
        f".{target.name}.{uuid.uuid4().hex}.partial"
    )  # two runs may write into one folder
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; make room there, or choose another folder"
        ) from error
    finally:
        with suppress(OSError):  # it is not there, or cannot be, as on a disk that can only be read
            partial.unlink()


@contextmanager
def unless_disk_full(loss: str) -> Iterator[None]:
    """What a training can do without: where it cannot be written, a warning says so. loss: what there will
    not be."""
    try:
        yield
    except (OSError, OutputError, CheckpointError) as error:
        log.warning("%s: %s; the training goes on", loss, error)


def make_folder(folder: Path) -> None:
    """Makes a folder where there is none. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the folder {folder} cannot be made: {error.strerror or error}; choose another one"
        ) from error


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Writes (h, w) or (h, w, 3) BGR, uint8 or uint16, as PNG. Raises OutputError."""
    with whole_file(path) as file:
        file.write(cv2.imencode(".png", picture)[1])


def check_writable(folder: Path, option: str) -> None:
    """A folder must be one, or one that can be made; makes nothing. Raises ConfigError naming the option that
    gave it."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"{option} {folder} cannot be written: {place} is no folder that this user may write to"
        )


def output_folder(path: str | os.PathLike, option: str) -> Path:
    """A folder that can be written, or made (`make_folder`) once there is something to write: what is refused
    later leaves no empty one. Raises ConfigError naming the option where something else is in its place."""
    folder = Path(path)
    check_writable(folder, option)
    return folder
