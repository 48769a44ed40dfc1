"""The errors that a user can cause and fix.

A `UserError` is raised on every rank alike, before any accelerator memory is taken unless what is wrong shows
only in values that are read later. The scripts in `launch/` print its message on stderr from rank 0 and
exit with code 2; from Python it is an ordinary exception. Anything else that is raised is a defect of the
program or of the machine.
"""

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path


class UserError(Exception):
    """The user's input is wrong; the message says what is wrong, where the value came from and how to fix
    it."""


class ConfigError(UserError):
    """An experiment config, a ds_config or a command-line option cannot work, or they contradict each
    other."""


class DataError(UserError):
    """A data set is missing, empty or damaged."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""


class DamagedError(CheckpointError):
    """A file does not hold what was written into it. May come while values are read."""


class FaultError(DataError):
    """One image cannot be read, and that was to be an error. Comes late, and from one rank alone."""


class OutputError(UserError):
    """A result cannot be written. Comes late, and from one rank alone."""


class HostError(UserError):
    """A host gives the run too little: open files, shared memory. Comes late, and from one rank alone."""


class Lost(RuntimeError):
    """A process of the run is gone. Comes from one rank alone; starting the run again may help."""


class Diverged(RuntimeError):
    """The loss or the gradient is not finite any more. Raised on every rank."""


OF_ONE_RANK = (FaultError, OutputError, HostError)
"""Errors of the user, or of a host, that come late, and that the other ranks know nothing of."""


def unless_on_every_rank(error: BaseException) -> BaseException | None:
    """`error`, where the other ranks may know nothing of it; None for one that all ranks raise."""
    of_all = isinstance(error, (UserError, Diverged)) and not isinstance(error, OF_ONE_RANK)
    return None if of_all else error


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key that exists nowhere, naming the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1)
    return ConfigError(
        f"unknown key {key!r} in {where}"
        + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}")
    )


def reason_of(error: BaseException) -> str:
    """An exception as "Type: text", on one line; where it has no text (a bare `assert`, also one that mmcv
    has wrapped), with the text of the one before it, or the place that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    origin = error
    while _without_text(origin) and (earlier := origin.__cause__ or origin.__context__) is not None:
        origin = earlier
    if origin is not error and not _without_text(origin):
        return f"{text}: {reason_of(origin)}"
    frames = traceback.extract_tb(origin.__traceback__) if _without_text(origin) else []
    return (
        f"{text}: `{frames[-1].line}` of {'/'.join(Path(frames[-1].filename).parts[-3:])}, line "
        f"{frames[-1].lineno}"
        if frames
        else text
    )


def nearest_argument(error: BaseException, classes: Mapping[str, type]) -> str:
    """ "; did you mean 'num_heads'?" for a constructor's complaint of an argument that it does not know; ""
    for anything else, and where none is near.

    classes: those that may have complained, by name.
    """
    found = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return ""
    kind = next(
        (kind for name, kind in classes.items() if found[1] in (name.rpartition(".")[2], kind.__name__)), None
    )
    # one that hands the rest of its arguments on has some of its own
    kinds = [kind] if kind is not None else []
    kinds += [each for each in classes.values() if str(error).startswith(f"{each.__name__}:")]
    known = [
        name
        for each in kinds
        for base in each.__mro__
        for name in inspect.signature(vars(base).get("__init__", object.__init__)).parameters
    ]
    near = difflib.get_close_matches(found[2], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_type(error: BaseException, known: Iterable[str]) -> str:
    """ "; did you mean 'FPN'?" for mmcv's complaint of a `type` that nobody has registered; "" for anything else,
    and where none of the `known` is near."""
    found = re.search(r"([\w.]+)'? is not in the|Unrecognized \w+ type (\w+)", str(error))
    if found is None:
        return ""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches((found[1] or found[2]).lower(), names, n=1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def _without_text(error: BaseException) -> bool:
    return not str(error).strip() or str(error).rstrip().endswith(":")


def shortened(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts, for a message: "1 image", "2 images", "2 processes".

    several: the words for any number but 1, where they are not those for one with "s" or "es" at the end.
    """
    plural = several or one + ("es" if one.endswith("s") else "s")
    return f"{number} {one if number == 1 else plural}"


def are(number: int) -> str:
    """ "is" or "are", behind so many things."""
    return "is" if number == 1 else "are"


def short_repr(value: object, limit: int = 60) -> str:
    """A value as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
