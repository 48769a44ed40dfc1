"""The data of an experiment examined: every check that a start makes, over all files, and more.

In: an `Experiment`. Out: a `Report` with all findings, where a start ends at the first one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mmseg.datasets import CustomDataset

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.checks.dataset_files import check_files, check_not_empty
from internseg_ds.data.checks.duplicates import Duplicates, duplicate_findings, find_duplicates
from internseg_ds.data.checks.file_findings import (
    label_maps_without_images,
    left_out,
    lossy,
    other_label_ending,
)
from internseg_ds.data.checks.findings import Finding, Setting
from internseg_ds.data.checks.image_findings import image_findings
from internseg_ds.data.checks.label_findings import Examined, label_findings
from internseg_ds.data.checks.looks import label_loader
from internseg_ds.data.checks.normalization import compare_normalization
from internseg_ds.data.checks.scan import Scanned, scan
from internseg_ds.data.checks.suggestions import normalization_findings
from internseg_ds.data.checks.survey import looked_at
from internseg_ds.data.checks.zero_labels import zero_label_findings
from internseg_ds.data.dataset_parts import SegmentationDataset, pipelines, plain_parts
from internseg_ds.data.datasets import assembled_datasets
from internseg_ds.data.entries import has_label_maps, leaf_datasets
from internseg_ds.data.palettes import check_decoder
from internseg_ds.data.rasters.findings import raster_findings
from internseg_ds.data_report.model_settings import class_settings, ignored_settings
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import UserError
from internseg_ds.preflight.dataset_checks import check_annotated, ignored_labels
from internseg_ds.preflight.loss_checks import check_losses
from internseg_ds.preflight.model_checks import check_channels, check_classes, compare_classes


@dataclass
class Report:
    """What was found. datasets, scanned: by name, "data.train" and "data.val", as far as they can be built."""

    findings: list[Finding] = field(default_factory=list)
    datasets: dict[str, SegmentationDataset] = field(default_factory=dict)
    scanned: dict[str, Scanned] = field(default_factory=dict)
    duplicates: Duplicates = field(default_factory=lambda: Duplicates([], []))

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.wrong]

    @property
    def odd(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.wrong]


def examine(experiment: Experiment, *, workers: int, sample: int | None = None) -> Report:
    """workers: processes that look; sample: images of each data set, None for all. Raises nothing for what is
    wrong with data: that is a finding."""
    report = Report()
    entries = [("data.train", experiment.train, True)]
    if experiment.val is not None and all(map(has_label_maps, leaf_datasets(experiment.val))):
        entries.append(("data.val", experiment.val, False))
    for what, entry, training in entries:
        dataset = _caught(
            report,
            "dataset",
            partial(assembled_datasets, entry, what, **({} if training else {"test_mode": True})),
        )
        if dataset is None:
            continue
        report.datasets[what] = dataset
        _check_files(report, dataset, entry, what)
        if training:
            _caught(report, "no-label-maps", partial(check_annotated, dataset))
        found = scan(looked_at(dataset), what, training=training, workers=workers, sample=sample)
        report.scanned[what] = found
        report.findings += _about(dataset, found, what, training)
    _compare(report, experiment)
    _check_model(report, experiment)
    everything = report.findings
    report.findings = [each for place, each in enumerate(everything) if each not in everything[:place]]
    return report


def _caught(report: Report, name: str, check: Callable[[], Any], settings: tuple[Setting, ...] = ()) -> Any:
    """What a check of a start returns; what it refuses with becomes a finding."""
    try:
        return check()
    except UserError as error:
        report.findings.append(Finding(name, str(error), wrong=True, settings=settings, kind=type(error)))
        return None


def _check_files(report: Report, dataset: SegmentationDataset, entry: Any, what: str) -> None:
    plain = list(plain_parts(dataset))
    for part in plain:
        settings = other_label_ending(part, what) if isinstance(part, CustomDataset) and part.ann_dir else ()
        _caught(report, "missing-files", partial(check_files, part, what), settings)
        if isinstance(part, CustomDataset):
            palette = Setting(what, "imdecode_backend", "pillow", step="LoadAnnotations")
            _caught(report, "palette-as-colours", partial(check_decoder, part, what), (palette,))
    leaves = list(leaf_datasets(entry))
    _caught(report, "empty", lambda: check_not_empty(dataset, plain, what, leaves))


def _about(dataset: SegmentationDataset, found: Scanned, what: str, training: bool) -> Iterator[Finding]:
    for part, images, rasters in zip(found.parts, found.images, found.rasters, strict=True):
        yield from left_out(part, found.parts, what)
        yield from label_maps_without_images(part, found.parts, what)
        yield from lossy(part, what)
        yield from image_findings(images, part, what)
        if rasters:
            yield from raster_findings(list(rasters.items()), part, what)
    loaders = [label_loader(part, training=training) for part in found.parts]
    if (first := next(filter(None, loaders), None)) is not None:
        about = Examined(what, found.parts[0], first, found.total, training, refused_above=0)
        yield from label_findings(found.labels, about)
    if found.labels.damaged:
        number = len(found.labels.damaged)
        yield Finding(
            "damaged",
            f"{what}: {number} label map{'s' * (number > 1)} cannot be read, the first is "
            f"{found.labels.damaged[0]}; copy it again, or take its image away",
            wrong=True,
        )
    for name in sorted(set(found.own_loaders)):
        yield Finding(
            "not-counted", f"{what}: label maps of {name} are read in a way of its own, and are not counted"
        )
    yield from normalization_findings(dataset, found.looks, what)


def _compare(report: Report, experiment: Experiment) -> None:
    """The data sets with each other."""
    if not {"data.train", "data.val"} <= report.datasets.keys():
        return
    train, val = report.datasets["data.train"], report.datasets["data.val"]
    report.findings += zero_label_findings(
        experiment.train, val, "data.val", zero_is_none=_zero_is_none(report, len(val.CLASSES))
    )
    for name, compare in (("classes", compare_classes), ("normalize", compare_normalization)):
        lines = _caught(report, name, partial(compare, train, val)) or []
        report.findings += [Finding(name, line) for line in lines]
    looks = [report.scanned[what].looks for what in ("data.train", "data.val")]
    report.duplicates = find_duplicates(*looks)
    report.findings += duplicate_findings(report.duplicates, len(looks[1]))


def _zero_is_none(report: Report, classes: int) -> bool | None:
    """Whether the numbers in the label maps are those of classes from 1 on; None where they do not show it."""
    numbers = {
        number
        for found in report.scanned.values()
        for number in found.labels.numbers
        if number not in (255, 65535, -1)
    }
    if not numbers or max(numbers) > classes:
        return None
    if max(numbers) == classes:
        return True
    return False if min(numbers) == 0 and max(numbers) == classes - 1 else None


def _check_model(report: Report, experiment: Experiment) -> None:
    """Heads and losses against the classes."""
    train = report.datasets.get("data.train")
    if train is None:
        return
    model = _caught(report, "model", lambda: build_on_meta(experiment.model))
    if model is None:
        return
    settings = tuple(class_settings(experiment.model, len(train.CLASSES)))
    lines = _caught(report, "classes", lambda: check_classes(model, train, "data.train"), settings) or []
    ignored = ignored_labels(train)
    settings = tuple(dict.fromkeys(ignored_settings(experiment.model, experiment.train, ignored)))
    lines += (
        _caught(
            report,
            "losses",
            lambda: check_losses(model, experiment.train, ignored, experiment.path),
            settings,
        )
        or []
    )
    report.findings += [Finding("model", line) for line in lines]
    for what, dataset in report.datasets.items():
        for steps in pipelines(dataset):
            _caught(report, "channels", partial(check_channels, model, steps, what))
