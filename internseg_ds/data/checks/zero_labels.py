"""Label maps that are trained on and scored against must be read alike: zero is a class in both, or in
neither."""

from collections.abc import Iterator
from typing import Any

from mmseg.datasets import DATASETS, CustomDataset

from internseg_ds.data.checks.findings import Finding, Setting, as_warnings
from internseg_ds.data.dataset_parts import SegmentationDataset, plain_parts
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.data.label_maps import LoadLabelMap
from internseg_ds.errors import ConfigError


def compare_zero_labels(train_entry: Any, val_set: SegmentationDataset, what: str) -> list[str]:
    """Warnings where two data sets of different kinds are not read alike.

    train_entry: of the config; its data need not be on this machine. val_set: built; what: its name in
    messages. Raises ConfigError where two of one kind are not.
    """
    return sorted(set(as_warnings(zero_label_findings(train_entry, val_set, what))))


def zero_label_findings(
    train_entry: Any, val_set: SegmentationDataset, what: str, *, zero_is_none: bool | None = None
) -> Iterator[Finding]:
    """What `compare_zero_labels` raises and returns. zero_is_none: what the label maps show, where they do."""
    for train, val in ((train, val) for train in leaf_datasets(train_entry) for val in plain_parts(val_set)):
        trained = [
            bool(step.get("reduce_zero_label"))
            for step in train.get("pipeline") or ()
            if step.get("type") == "LoadAnnotations"
        ]
        scored = getattr(val, "reduce_zero_label", None)
        if isinstance(getattr(val, "gt_seg_map_loader", None), LoadLabelMap):
            scored = val.gt_seg_map_loader.reduce_zero_label
        if not trained or scored is None or trained[0] == scored:
            continue
        difference = (
            f"reduce_zero_label={trained[0]} of LoadAnnotations in data.train.pipeline, and "
            f"reduce_zero_label={scored} of {what} "
            f"({type(val).__name__}): what is trained as class n is scored as class n "
            f"{'+' if trained[0] else '-'} 1"
        )
        kind = DATASETS.get(train["type"]) if isinstance(train.get("type"), str) else train.get("type")
        if kind is type(val) and (type(val) is not CustomDataset or train.get("data_root") == val.data_root):
            yield Finding(
                "zero-label",
                f"{difference}; write reduce_zero_label=True in both where 0 in the label maps stands for no "
                "class, and in neither where it is one",
                wrong=True,
                settings=_settings(val, scored, zero_is_none, what),
                kind=ConfigError,
            )
        else:
            yield Finding(
                "zero-label", f"{difference}, unless the label maps of the two sets differ in just this"
            )


def _settings(
    val: SegmentationDataset, scored: bool, zero_is_none: bool | None, what: str
) -> tuple[Setting, ...]:
    """What makes both sides the same: as the kind of data set has it, or as the label maps have it."""
    if type(val) is not CustomDataset:  # its kind says so itself
        return (Setting("data.train", "reduce_zero_label", scored, step="LoadAnnotations"),)
    if zero_is_none is None:
        return ()
    if scored == zero_is_none:
        return (Setting("data.train", "reduce_zero_label", scored, step="LoadAnnotations"),)
    return (Setting(what, "reduce_zero_label", zero_is_none),)
