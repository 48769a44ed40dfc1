"""What launch/test.py does, as Python functions: evaluate trained weights on a config's test set, or write
the submission files of the set's benchmark.

The images are split over the processes that a launcher started.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from internseg_ds.config.sections import known_metrics
from internseg_ds.data.checks.survey import survey
from internseg_ds.data.checks.zero_labels import compare_zero_labels
from internseg_ds.data.dataset_parts import pipelines
from internseg_ds.data.rasters.windows import WINDOW, Window, whole
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import ConfigError, OutputError, counted
from internseg_ds.evaluation.class_table import is_of_one_class
from internseg_ds.evaluation.evaluator import (
    Evaluation,
    EvaluationOptions,
    ImageObserver,
    ReadableImages,
    evaluate_datasets,
)
from internseg_ds.evaluation.inference import InferenceRun, trained_segmentor
from internseg_ds.evaluation.report import BestAndWorst, FirstImages, write_report
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.output_files import make_folder, output_folder
from internseg_ds.preflight.dataset_checks import odd_about, validation_set
from internseg_ds.preflight.model_checks import check_channels, check_classes, check_same_classes

log = logging.getLogger(__name__)


def test(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    metrics: Sequence[str] | None = None,
    out: str | os.PathLike | None = None,
    extremes: int = 5,
    show_dir: str | os.PathLike | None = None,
    show_count: int = 20,
    strict: bool = False,
    ema: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate `checkpoint` on the config's test set. Collective.

    out: folder for results.json, per_class.csv, confusion.png and overlays of the `extremes` best and worst
    images. show_dir: folder for the first `show_count` overlays. strict: an image that cannot be read is an
    error. ema: of a ZeRO checkpoint, the averaged weights. Raises UserError when config, data or checkpoint
    cannot work, before any process takes its device.
    """
    # as many arguments as the command line has options
    run = InferenceRun.open(config, checkpoint, ema=ema, cfg_options=cfg_options)
    names = known_metrics(tuple(metrics), "--eval") if metrics else run.experiment.evaluation.metrics
    report = output_folder(out, "--out") if out is not None else None
    first = output_folder(show_dir, "--show-dir") if show_dir is not None else None
    dataset: Any = validation_set(run.experiment, "test")
    pictures = _Pictures(report, extremes, first, show_count, isinstance(dataset, ConcatDataset))
    warnings = _check(run, dataset)
    if run.world.is_main:
        for warning in warnings:
            log.warning(warning)
    options = EvaluationOptions(run.world, run.experiment.workers, metrics=names, strict=strict)
    with trained_segmentor(run) as forwards:
        result = evaluate_datasets(forwards, dataset, options, observers_of=pictures.observers)
        if run.world.is_main:
            totals = {name: value for name, value in result.metrics.items() if not is_of_one_class(name)}
            ordered = sorted(totals, key=lambda name: name != names[0])  # as in a training's lines
            scores = ", ".join(f"{name} {100 * totals[name]:.2f} %" for name in ordered)
            log.info("%s: %s", checkpoint, scores)
            if report is not None:
                write_report(result, dataset.CLASSES, report)
        for folder, extreme in pictures.drawn.items():
            extreme.write(folder, run.world)
    return result


def _check(run: InferenceRun, dataset: Any) -> list[str]:
    """Check that data set, model and weights match; returns warnings. On every rank: what one raises, all
    must."""
    meta_model = build_on_meta(run.experiment.model)
    check_classes(meta_model, dataset, "data.test")
    for steps in pipelines(dataset):
        check_channels(meta_model, steps, "data.test")
    meta = run.check_weights(meta_model)
    origin = f"checkpoint {run.checkpoint}"
    return [
        *check_same_classes(meta.get("CLASSES"), dataset.CLASSES, origin, "data.test"),
        *compare_zero_labels(run.experiment.train, dataset, "data.test"),
        *odd_about(dataset, "data.test"),
        *survey(dataset, "data.test", training=False),
    ]


@dataclass
class _Pictures:
    """Which pictures an evaluation draws, and those that are drawn at its end."""

    report: Path | None
    """Folder of the report, with the best and worst images; None for none."""
    extremes: int
    """How many of the best and of the worst images."""
    first: Path | None
    """Folder of the first images; None for none."""
    first_count: int
    joined_sets: bool
    """Whether the data set joins several, each of which has pictures in a folder of its own."""
    drawn: dict[Path, BestAndWorst] = field(default_factory=dict)
    """By their folder."""

    def observers(self, number: int, dataset: Any) -> list[ImageObserver]:
        """number: of the data set among those that are joined."""
        found: list[ImageObserver] = []
        if self.report is not None:
            folder = self._folder(self.report, number)
            self.drawn[folder] = BestAndWorst(dataset, self.extremes)
            found.append(self.drawn[folder])
        if self.first is not None:
            found.append(FirstImages(dataset, self._folder(self.first, number), self.first_count))
        return found

    def _folder(self, folder: Path, number: int) -> Path:
        return folder / str(number) if self.joined_sets else folder


def write_submission(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    strict: bool = False,
    ema: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> None:
    """Write the files that the benchmark of the config's test set takes (mmseg's `format_results`) into the
    folder `out`; needs no ground truth. Collective.

    Raises UserError as `test` does, and for a data set without such a format.
    """
    run = InferenceRun.open(config, checkpoint, ema=ema, cfg_options=cfg_options)
    folder = output_folder(out, "--format-only")
    dataset: Any = validation_set(run.experiment, "test", truth=False)
    meta_model = build_on_meta(run.experiment.model)
    check_classes(meta_model, dataset, "data.test")
    for steps in pipelines(dataset):
        check_channels(meta_model, steps, "data.test")
    check_format(dataset)
    run.check_weights(meta_model)
    with trained_segmentor(run) as forwards:
        images = ReadableImages(
            dataset,
            run.world,
            run.experiment.workers,
            run.world.device,
            strict=strict,
            truth=False,
            doing="segmenting",
        )
        inference = SlidingWindowInference(forwards)
        published = published_classes(dataset, inference.outputs)
        written = 0
        for prediction in inference.predict((image.index, image.inputs) for image in images):
            labels = published[prediction.labels.cpu().numpy()]
            make_folder(folder)
            try:
                dataset.format_results([labels], str(folder), indices=[prediction.key])
            except OSError as error:
                raise OutputError(
                    f"the submission files in {folder} cannot be written: {error.strerror or error}; "
                    "make room there, or choose another folder"
                ) from error
            written += 1
        total, _ = images.totals(written)
        log.info(
            "%s: submission files of %s are in %s", counted(total, "image"), type(dataset).__name__, folder
        )


def published_classes(dataset: Any, outputs: int) -> np.ndarray:
    """(n) int64: the number of each class among all classes of the benchmark, which mmseg's `format_results`
    expects; a config may select some of them, or another order.

    outputs: number of outputs of the model, which may be more than the data set has classes; those keep their
    numbers.
    """
    chosen = {
        new: old
        for old, new in (getattr(dataset, "label_map", None) or {}).items()
        if new != dataset.ignore_index
    }
    return np.array([chosen.get(index, index) for index in range(max(len(dataset.CLASSES), outputs))])


def _is_part(window: Window | None) -> bool:
    return window is not None and window != whole(window.scene)


def check_format(dataset: Any) -> None:
    """Check, by writing one of a single pixel, that the data set can write submission files, and that each
    image gets a file of its own. Raises ConfigError."""
    if isinstance(dataset, ConcatDataset):
        raise ConfigError(
            f"data.test joins {counted(len(dataset.datasets), 'data set')}, and submission files are of "
            "one; keep one of them"
        )
    if any(_is_part(info.get(WINDOW)) for info in dataset.img_infos):
        raise ConfigError(
            "data.test takes scenes apart (tile of LoadRaster), and submission files are of whole images; leave tile "
            "out where scenes fit into memory, or use launch/predict.py --scenes, which writes label maps of whole ones"
        )
    name, times = Counter(Path(info["filename"]).stem for info in dataset.img_infos).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{times} images of data.test are called {name}, their submission files would overwrite each "
            "other; give data.test one folder at a time"
        )
    with tempfile.TemporaryDirectory() as place:
        try:
            dataset.format_results([np.zeros((1, 1), np.int64)], place, indices=[0])
        except NotImplementedError:
            raise ConfigError(
                f"{type(dataset).__name__} has no format for submissions; leave --format-only out, or use "
                "launch/predict.py for label maps"
            ) from None
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the submission files of {type(dataset).__name__} need the package {error.name}; pip "
                f"install {error.name}"
            ) from None
