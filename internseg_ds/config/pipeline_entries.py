"""The pipeline steps of a `data.train` or `data.val` entry of a config, those of its wrappers too."""

from collections.abc import Iterator, Mapping
from typing import Any


def steps_of(entry: Any) -> Iterator[Mapping[str, Any]]:
    """Each step of each data set in lists and wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset,
    ...), and of wrappers with a pipeline."""
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from steps_of(part)
    elif isinstance(entry, Mapping):
        yield from (step for step in entry.get("pipeline") or () if isinstance(step, Mapping))
        yield from steps_of([entry.get("dataset"), *(entry.get("datasets") or ())])
