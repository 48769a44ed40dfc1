"""Files that a data set leaves out since their names have another ending than it asks for: found, and named
in messages.

In: folders and endings. Out: paths, or the end of a message.
"""

import os
from collections import Counter
from collections.abc import Iterator

from internseg_ds.errors import counted

SAME = ({".jpg", ".jpeg"}, {".tif", ".tiff"})
"""Endings of one format."""


def alike(suffix: str) -> set[str]:
    """What `suffix` may have been meant as, in lower case: other endings of its format too."""
    head, dot, ending = suffix.lower().rpartition(".")
    ending = dot + ending
    return {head + other for other in next((same for same in SAME if ending in same), {ending})}


def files_alike(folder: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(path inside the folder, the same without its ending) of files whose names end almost as `suffix`
    says."""
    endings = alike(suffix)
    for path in _files(folder):
        ending = next((some for some in endings if path.lower().endswith(some)), None)
        if ending is not None and not path.endswith(suffix):
            yield path, path[: -len(ending)]


def there_are(folder: str, suffix: str, setting: str) -> str:
    """The files of a folder in which none ends in `suffix`, as the end of a message that says what to set.

    setting: the name of that suffix. Where some end almost so, these; else those of the ending that most
    have.
    """
    found = [(path, path[len(stem) :]) for path, stem in files_alike(folder, suffix)]
    found = found or [(path, ending) for path in _files(folder) if (ending := os.path.splitext(path)[1])]
    if not found:
        return f"; there is no image in {folder}"
    ((ending, count),) = Counter(ending for _, ending in found).most_common(1)
    first = min(path for path, its in found if its == ending)
    meant = f"if these are meant, set {setting}={ending!r}, or rename them"
    return f"; {counted(count, 'file there ends', 'files there end')} in {ending!r} ({first}): {meant}"


def instead_of(path: str) -> str:
    """A file beside one that is missing, of the same name and another ending, in brackets, or that a folder has its
    name; empty where there is neither."""
    if os.path.isdir(path):
        return " (which is a folder)"
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    there = os.listdir(folder) if os.path.isdir(folder) else []
    names = sorted(name for name in there if os.path.isfile(os.path.join(folder, name)))
    other = next((entry for entry in names if os.path.splitext(entry)[0] == stem), None)
    return f" (there is {other})" if other is not None else ""


def _files(folder: str) -> Iterator[str]:
    for inner, _, names in os.walk(folder):
        yield from (os.path.relpath(os.path.join(inner, name), folder) for name in names)
