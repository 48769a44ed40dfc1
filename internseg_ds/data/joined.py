"""Several data sets one after the other: mmseg's `ConcatDataset`, which refuses Cityscapes whether it is
scored or trained on, and cannot score joined ones.

In: a config entry with lists, `ConcatDataset`s, or lists of folders. Out: an entry that mmseg builds as
`JoinedDatasets`. Importing this module registers that in mmseg's DATASETS.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmseg.datasets import DATASETS, build_dataset
from torch.utils.data import ConcatDataset

from internseg_ds.errors import ConfigError, DataError

FOLDERS = ("img_dir", "ann_dir", "split")
SEVERAL = (*FOLDERS, "img_suffix")
"""What a data set may have several of, to be as many data sets; one ending is that of each."""


@DATASETS.register_module()
class JoinedDatasets(ConcatDataset):
    """The data sets of `datasets` (configs) in their order, those of joined ones among them each by itself.
    default_args: for each."""

    def __init__(self, datasets: Sequence[Any], **default_args: Any) -> None:
        parts: list[Any] = []
        for config in datasets:
            built = build_dataset(config, default_args or None)
            parts += built.datasets if isinstance(built, JoinedDatasets) else [built]
        super().__init__(parts)
        self.CLASSES, self.PALETTE = parts[0].CLASSES, parts[0].PALETTE


def joining(entry: Any, what: str) -> Any:
    """A config entry with `JoinedDatasets` in place of each list, each ConcatDataset and each data set of
    several folders, split files or endings of images.

    what: its name in messages ("data.train"). One data set in a list is that data set. Raises ConfigError
    where the numbers of folders do not agree, DataError for a repetition that leaves no image.
    """
    if isinstance(entry, (list, tuple)):
        inner = [joining(item, what) for item in entry]
        return inner[0] if len(inner) == 1 else dict(type="JoinedDatasets", datasets=inner)
    if not isinstance(entry, Mapping):
        return entry
    if entry.get("type") == "ConcatDataset":
        return joining(entry["datasets"], what)
    if "dataset" in entry:
        if entry.get("type") == "RepeatDataset":
            _check_times(entry.get("times"), what)
        return {**entry, "dataset": joining(entry["dataset"], what)}
    if any(isinstance(entry.get(key), (list, tuple)) for key in SEVERAL):
        return joining(_of_each_folder(entry, what), what)
    if isinstance(entry.get("classes"), str):
        return {**entry, "classes": _names_in(entry["classes"], what)}
    return entry


def _check_times(times: Any, what: str) -> None:
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise DataError(
            f"{what} repeats a data set times={times!r}, and it must be a whole number of at least 1, or none of its "
            "images is ever drawn; set times to 1 or more, or leave the RepeatDataset out"
        )


def _names_in(file: str, what: str) -> list[str]:
    """A class for each line of a file; mmseg takes an empty line and a byte-order mark for a name, or a part
    of one. Raises DataError."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{what}.classes={file!r} names a file of classes that cannot be read: {error}; give one name "
            "a line, or a list of names"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def _of_each_folder(entry: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """An entry for each of several folders, split files or endings, as mmseg pairs them: each img_dir with its
    own ann_dir, or one img_dir with each split, or with each ending of its images."""
    given = {
        key: list(entry[key]) if isinstance(entry[key], (list, tuple)) else [entry[key]]
        for key in SEVERAL
        if entry.get(key) is not None and (key in FOLDERS or not isinstance(entry[key], str))
    }
    counts = {key: len(values) for key, values in given.items()}
    most = max(counts.values())
    allowed = (most,) if counts.get("img_dir", 1) > 1 else (1, most)
    if most == 0 or any(count not in allowed for count in counts.values()):
        raise ConfigError(
            f"{what} has {', '.join(f'{count} {key}' for key, count in counts.items())}, which cannot be "
            "paired; give one of each per data set"
        )
    common = {key: value for key, value in entry.items() if key != "separate_eval"}
    return [
        {**common, **{key: values[place if len(values) > 1 else 0] for key, values in given.items()}}
        for place in range(most)
    ]


def wrapper_in(entry: Any) -> str | None:
    """The type of a wrapper in a config entry that repeats or mixes images, if there is one."""
    if isinstance(entry, (list, tuple)):
        return next(filter(None, map(wrapper_in, entry)), None)
    if isinstance(entry, Mapping) and entry.get("type") == "ConcatDataset":
        return wrapper_in(entry["datasets"])
    return entry["type"] if isinstance(entry, Mapping) and "dataset" in entry else None
