"""Images and their label maps, found in nested folders by two patterns and paired by what the wildcards match.

In: folders and glob patterns. Out: `Pair`s of paths, sorted; or a DataError that names the nearest file.
"""

import difflib
import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from internseg_ds.data.checks.other_endings import alike
from internseg_ds.errors import ConfigError, DataError, are, counted, shortened

WILDCARD = re.compile(r"\*\*/|\*|\?|\[[^\]]+\]")
"""What stands for something in a pattern, as Python's glob has it."""


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
    for root in roots:
        if not os.path.isdir(root):
            raise DataError(f"there is no folder {root} (root){_nearest_folder(root)}")
        found += _pairs_below(root, images, masks)
    return found


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
    for path in glob.glob(pattern, root_dir=root, recursive=True):
        match = expression.fullmatch(path)
        if match is not None and os.path.isfile(os.path.join(root, path)):
            found[match.groups(default="")] = path
    return found


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
    return [path for path in glob.glob("**/*", root_dir=root, recursive=True) if os.path.splitext(path)[1]]


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
