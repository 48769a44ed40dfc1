"""Images and their label maps, found in nested folders by two patterns and paired by what the wildcards match.

In: folders and glob patterns. Out: `Pair`s of paths, sorted; or a DataError that names the nearest file.
"""

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from internseg_ds.data.checks.other_endings import alike
from internseg_ds.errors import ConfigError, DataError, are, counted, shortened

WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")
"""What stands for something in a pattern, as Python's glob has it."""
HIDDEN = re.compile(r"(^|/)\.")
"""In a pattern that asks for hidden files or folders."""


@dataclass(frozen=True)
class Pair:
    """One image. Paths are below `root`."""

    root: str
    image: str
    mask: str | None
    """None where none was asked for."""
    stem: str
    """What the wildcards matched: "scene 1/tile_7"."""


def paired(roots: Sequence[str], images: Sequence[str], masks: str | None) -> list[Pair]:
    """Each image with its mask, in the order of `roots`, then by path.

    images: patterns below each root; masks: the pattern of label maps, which has as many wildcards. A file that
    is a mask is no image. Raises ConfigError for patterns that cannot be paired, DataError for a folder that
    is not there, one without images, an image without a mask, and two images with the same one.
    """
    for pattern in images:
        _check_patterns(pattern, masks)
    found: list[Pair] = []
    seen: dict[tuple[str, str], Pair] = {}
    for root in roots:
        if not os.path.isdir(root):
            raise DataError(f"there is no folder {root} (root){_nearest_folder(root)}")
        pairs = _pairs_below(root, images, masks)
        if len(roots) > 1:
            _check_seen(pairs, seen)
        found += pairs
    return found


def _check_seen(pairs: Sequence[Pair], seen: dict[tuple[str, str], Pair]) -> None:
    """Raises ConfigError where images and masks of one root are among those of earlier ones, and adds them to these.
    seen: by their real paths."""
    real: dict[str, str] = {}  # of folders; a link to a file is a file of its own

    def place(pair: Pair, path: str) -> str:
        folder, name = os.path.split(os.path.join(pair.root, path))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        return os.path.join(real[folder], name)

    places = {(place(pair, pair.image), place(pair, pair.mask or "")): pair for pair in pairs}
    if twice := places.keys() & seen.keys():
        (image, _), *_ = sorted(twice)
        first, second = (found[min(twice)].root for found in (seen, places))
        raise ConfigError(
            f"root names {first} and {second}, and {counted(len(twice), 'image is', 'images are')} below both "
            f"({image}), which would count twice; take one out (to repeat images, there is RepeatDataset)"
        )
    seen |= places


def _pairs_below(root: str, images: Sequence[str], masks: str | None) -> list[Pair]:
    by_stem = {} if masks is None else _matches(root, masks)
    are_masks = set(by_stem.values())
    pairs: dict[tuple[str, ...], Pair] = {}
    for pattern in images:
        for parts, image in sorted(_matches(root, pattern).items(), key=lambda item: item[1]):
            if image in are_masks:
                continue
            if parts in pairs and pairs[parts].image != image:
                raise DataError(
                    f"{root}: {pairs[parts].image} and {image} have the same name but for their endings, so "
                    "they would have the same label map; take one away"
                )
            pairs[parts] = Pair(root, image, by_stem.get(parts), "".join(parts))
    if not pairs:
        raise DataError(f"no file of {root} matches images={shortened(list(images))!r}{_what_is_there(root)}")
    if masks is not None:
        _check_masks(root, masks, pairs)
    return sorted(pairs.values(), key=lambda pair: pair.image)


def other_case(roots: Sequence[str], images: Sequence[str], masks: str | None) -> list[Pair]:
    """Files that `images` would match if it were not for upper and lower case, or for another usual ending of
    the same format (.jpeg, .tiff), and that it does not."""
    found = []
    for root in roots:
        by_stem = {} if masks is None else _matches(root, masks)
        taken = {path for pattern in images for path in _matches(root, pattern).values()}
        expressions = [
            _expression(stem + ending, re.IGNORECASE)
            for pattern in images
            for stem, ending in [os.path.splitext(pattern)]
            for ending in sorted(alike(ending))
        ]
        for path in sorted(set(_files(root)) - taken - set(by_stem.values())):
            match = next(filter(None, (expression.fullmatch(path) for expression in expressions)), None)
            if match is not None:
                parts = match.groups(default="")
                found.append(Pair(root, path, by_stem.get(parts), "".join(parts)))
    return found


def masks_without_images(roots: Sequence[str], images: Sequence[str], masks: str) -> list[str]:
    """Paths of label maps for whose wildcards there is no image, of any case."""
    lonely = []
    for root in roots:
        meant = {pair.mask for pair in other_case([root], images, masks)}
        have = {parts for pattern in images for parts in _matches(root, pattern)}
        lonely += [
            os.path.join(root, path)
            for parts, path in sorted(_matches(root, masks).items())
            if parts not in have and path not in meant
        ]
    return lonely


def _check_masks(root: str, masks: str, pairs: Mapping[tuple[str, ...], Pair]) -> None:
    missing = [(parts, pair) for parts, pair in pairs.items() if pair.mask is None]
    if missing:
        parts, first = min(missing, key=lambda item: item[1].image)
        wanted = _filled(masks, parts)
        raise DataError(
            f"{root}: {len(missing)} of {counted(len(pairs), 'image')} {are(len(missing))} without a label map: "
            f"that of {first.image} would be {wanted}{_nearest_file(root, wanted)}; put it there, correct "
            f"masks={masks!r}, or take the image away"
        )


def _check_patterns(images: str, masks: str | None) -> None:
    for key, pattern in (("images", images), ("masks", masks)):
        if pattern is not None and (os.path.isabs(pattern) or ".." in pattern.split("/")):
            raise ConfigError(f"{key}={pattern!r} must be a pattern below root, such as '**/*.png'")
    kinds = [WILDCARD.findall(pattern) for pattern in (images, masks) if pattern is not None]
    if not kinds[0]:
        raise ConfigError(
            f"images={images!r} has no wildcard, so it is one file; write 'images/**/*.jpg', say"
        )
    if len({len(kind) for kind in kinds}) > 1:
        raise ConfigError(
            f"images={images!r} has {counted(len(kinds[0]), 'wildcard')} and masks={masks!r} {len(kinds[1])}: "
            "an image and its label map are those for which the wildcards match the same, so both need as many"
        )


def _matches(root: str, pattern: str) -> dict[tuple[str, ...], str]:
    """What the wildcards match -> path of the file. Hidden files are left out, as by any glob."""
    expression = _expression(pattern)
    found = {}
    for path in _candidates(root, pattern):
        match = expression.fullmatch(path)
        if match is not None and os.path.isfile(os.path.join(root, path)):
            found[match.groups(default="")] = path
    return found


def _candidates(root: str, pattern: str) -> Iterable[str]:
    """Paths below `root` among which are all that a pattern matches. Python's glob follows a link to a folder above it
    some forty times, so that each file there has as many paths."""
    if "**/" not in pattern or HIDDEN.search(pattern):
        return glob.glob(pattern, root_dir=root, recursive=True)
    fixed = os.path.dirname(pattern[: WILDCARD.search(pattern).start()])  # type: ignore[union-attr]
    return (os.path.join(fixed, path) for path in files_below(os.path.join(root, fixed)))


def files_below(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths below a folder of all files that are not hidden, also behind links, but not behind those that lead back to
    a folder they are in. above: the real paths of these."""
    there: list[os.DirEntry[str]] = []
    real = os.path.realpath(folder)
    if real in above or not os.path.isdir(folder):
        return
    with suppress(OSError), os.scandir(folder) as entries:  # as glob does: one that may not be read is empty
        there = sorted(
            (entry for entry in entries if not entry.name.startswith(".")), key=lambda each: each.name
        )
    for entry in there:
        if os.path.isdir(entry.path):  # of a link to itself too
            inner = files_below(entry.path, above | {real})
            yield from (os.path.join(entry.name, path) for path in inner)
        else:
            yield entry.name


def _expression(pattern: str, flags: int = 0) -> re.Pattern:
    """The pattern with a group for each wildcard."""
    text, end = "", 0
    for wildcard in WILDCARD.finditer(pattern):
        text += re.escape(pattern[end : wildcard.start()])
        text += {"**/": "((?:.*/)?)", "*": "([^/]*)", "?": "([^/])"}.get(
            wildcard[0], f"({wildcard[0].replace('[!', '[^')})"
        )
        end = wildcard.end()
    return re.compile(text + re.escape(pattern[end:]), flags)


def _filled(pattern: str, parts: Sequence[str]) -> str:
    """The pattern with what the wildcards of the other one matched."""
    values = iter(parts)
    return WILDCARD.sub(lambda _: next(values), pattern)


def _files(root: str) -> list[str]:
    return [path for path in files_below(root) if os.path.splitext(path)[1]]


def _nearest_file(root: str, wanted: str) -> str:
    near = nearest(wanted, _files(root))
    return f" (the nearest file is {near})" if near else ""


def nearest(wanted: str, names: Iterable[str]) -> str | None:
    """The name that is most like another, if any is."""
    found = difflib.get_close_matches(wanted, list(names)[:20_000], 1, 0.6)
    return found[0] if found else None


def _nearest_folder(root: str) -> str:
    parent = os.path.dirname(os.path.abspath(root))
    if not os.path.isdir(parent):
        return f"; there is no {parent} either"
    there = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    return f"; {parent} holds {shortened(there) or 'no folder'}"


def _what_is_there(root: str) -> str:
    endings = Counter(os.path.splitext(path)[1] for path in _files(root))
    if not endings:
        return "; it holds no files"
    most = [f"{count} {ending}" for ending, count in endings.most_common(3)]
    first = min(path for path in _files(root) if path.endswith(endings.most_common(1)[0][0]))
    return f"; its files end in {', '.join(most)} ({first})"
