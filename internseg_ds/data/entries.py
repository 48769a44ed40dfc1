"""What a `data.train` or `data.val` entry of a config holds, before anything is built of it: data sets inside
wrappers, and steps of pipelines."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmcv import ConfigDict

from internseg_ds.errors import ConfigError


def leaf_datasets(entry: Any) -> Iterator[ConfigDict]:
    """The plain data sets inside wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset, lists, ...) of
    a `data.train` or `data.val` entry.

    Raises ConfigError for a ConcatDataset of nothing.
    """
    if isinstance(entry, (list, tuple)):
        for item in entry:
            yield from leaf_datasets(item)
    elif isinstance(entry, Mapping) and entry.get("type") == "ConcatDataset":
        if not isinstance(entry.get("datasets"), (list, tuple)) or not entry["datasets"]:
            raise ConfigError("a ConcatDataset of the config needs datasets=[dict(...), dict(...)]")
        yield from leaf_datasets(entry["datasets"])
    elif isinstance(entry, Mapping) and "dataset" in entry:
        yield from leaf_datasets(entry["dataset"])
    else:
        yield entry


def steps_of(entry: Any) -> Iterator[Mapping[str, Any]]:
    """Each step of each data set in lists and wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset,
    ...), and of wrappers with a pipeline. Raises ConfigError for a pipeline that is no list."""
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from steps_of(part)
    elif isinstance(entry, Mapping):
        pipeline = entry.get("pipeline")
        if not isinstance(pipeline, (list, tuple, type(None))):
            raise ConfigError(f"pipeline={pipeline!r} of a {entry.get('type')} must be a list of transforms")
        yield from (step for step in pipeline or () if isinstance(step, Mapping))
        yield from steps_of([entry.get("dataset"), *(entry.get("datasets") or ())])


def with_inner_steps(pipeline: Iterable[Any]) -> Iterator[Any]:
    """Each step of a pipeline of a config, and those inside it (of MultiScaleFlipAug and the like)."""
    for step in pipeline:
        yield step
        yield from with_inner_steps(step.get("transforms") or ())


LABEL_MAPS = ("ann_dir", "masks")
"""Where the label maps of a data set are, as mmseg's own and `FolderDataset` have it."""


def has_label_maps(leaf: Mapping[str, Any]) -> bool:
    """Whether the entry of a plain data set names label maps."""
    return any(leaf.get(key) is not None for key in LABEL_MAPS)


def leave_out_label_maps(leaf: ConfigDict) -> None:
    """Has the entry of a plain data set name none."""
    leaf["masks" if "masks" in leaf else "ann_dir"] = None
