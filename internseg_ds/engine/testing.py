"""What launch/test.py does, for Python too: evaluate finished weights on a config's test set, or write what the set's benchmark takes.

The images are split over the processes that a launcher started.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from internseg_ds.data.survey import compare_zero_labels, survey
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import world_from_environment
from internseg_ds.distributed.watch import joined
from internseg_ds.engine.evaluator import Evaluation, Watcher, conclude, evaluate_each, images_of
from internseg_ds.engine.experiment import known_metrics, leaf_datasets, read_experiment
from internseg_ds.engine.inference import ready
from internseg_ds.engine.model_checks import check_classes, check_same_classes, check_windows
from internseg_ds.engine.outputs import output_folder
from internseg_ds.engine.preflight import odd_about, validation_set
from internseg_ds.engine.report import Extremes, Shower, write_report
from internseg_ds.engine.segmenting import Segmenter
from internseg_ds.engine.starting_weights import check_weights_fit
from internseg_ds.engine.trackers import start_logging
from internseg_ds.errors import ConfigError, OutputError

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
    """Evaluates `checkpoint` on the config's test set; collective.

    out: folder for results.json, per_class.csv, confusion.png and overlays of the `extremes` best and worst images. show_dir: folder for the first
    `show_count` overlays. strict: an image that cannot be read is an error. ema: of a ZeRO checkpoint, the averaged weights.
    Raises UserError when config, data or checkpoint cannot work, before any process takes its device.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    start_logging(None, level=experiment.log_level, is_main=world.is_main)
    metrics = known_metrics(tuple(metrics), "--eval") if metrics else experiment.metrics
    folder = output_folder(out, "--out") if out is not None else None
    shown = output_folder(show_dir, "--show-dir") if show_dir is not None else None
    check_windows(experiment)
    dataset = validation_set(experiment, "test")
    meta_model = build_on_meta(experiment.model)
    check_classes(meta_model, dataset, "data.test")
    meta = check_weights_fit(meta_model, checkpoint, ema=ema, check=experiment.engine.checksums)
    odd = check_same_classes(meta.get("CLASSES"), dataset.CLASSES, f"checkpoint {checkpoint}", "data.test")
    odd += compare_zero_labels(list(leaf_datasets(experiment.train)), dataset, "data.test") + odd_about(
        dataset, "data.test"
    )
    odd += survey(
        dataset, "data.test", training=False
    )  # on every rank, for what it refuses they all have to know
    with joined(world):
        for said in odd if world.is_main else ():
            log.warning(said)
        forwards = ready(experiment, checkpoint, world, ema=ema)
        joined_sets = isinstance(dataset, ConcatDataset)  # of which each has pictures in a folder of its own
        drawn: dict[Path, Extremes] = {}

        def watchers(number: int, part: Any) -> list[Watcher]:
            found: list[Watcher] = []
            if folder is not None:
                place = folder / str(number) if joined_sets else folder
                drawn[place] = Extremes(part, extremes)
                found.append(drawn[place])
            if shown is not None:
                found.append(Shower(part, shown / str(number) if joined_sets else shown, show_count))
            return found

        result = evaluate_each(
            forwards,
            dataset,
            world=world,
            workers=experiment.workers,
            metrics=metrics,
            strict=strict,
            watchers=watchers,
        )
        if world.is_main:
            log.info(
                "%s: %s",
                checkpoint,
                ", ".join(
                    f"{name} {100 * value:.2f}" for name, value in result.metrics.items() if "." not in name
                ),
            )
            if folder is not None:
                write_report(result, dataset.CLASSES, folder)
        for place, extreme in drawn.items():
            extreme.write(place, world)
    return result


def write_submission(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    strict: bool = False,
    ema: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> None:
    """Writes the files that the benchmark of the config's test set takes (mmseg's `format_results`) into the folder `out`; needs no ground truth. Collective.

    Raises UserError as `test` does, and for a data set without such a format.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    start_logging(None, level=experiment.log_level, is_main=world.is_main)
    folder = output_folder(out, "--format-only")
    check_windows(experiment)
    dataset = validation_set(experiment, "test", truth=False)
    meta_model = build_on_meta(experiment.model)
    check_classes(meta_model, dataset, "data.test")
    _check_format(dataset)
    check_weights_fit(meta_model, checkpoint, ema=ema, check=experiment.engine.checksums)
    with joined(world):
        forwards = ready(experiment, checkpoint, world, ema=ema)
        faults: list[str] = []
        published = published_classes(dataset, forwards.segmentor.out_channels)
        images = images_of(
            dataset,
            world,
            experiment.workers,
            world.device,
            faults,
            strict=strict,
            truth=False,
            doing="segmenting",
        )
        written = 0
        for segmented in Segmenter(forwards).segment((image.index, image.inputs) for image in images):
            try:
                dataset.format_results(
                    [published[segmented.labels.cpu().numpy()]], str(folder), indices=[segmented.key]
                )
            except OSError as error:
                raise OutputError(
                    f"the submission files in {folder} cannot be written: {error.strerror or error}; "
                    "make room there, or choose another folder"
                ) from error
            written += 1
        total, _ = conclude(written, faults, world)
        log.info("%d images: submission files of %s are in %s", total, type(dataset).__name__, folder)


def published_classes(dataset: Any, outputs: int) -> np.ndarray:
    """(n,) int64: the number that each class has among all those of the data set's kind, which mmseg's `format_results` takes a prediction for; a config may
    have chosen some of them, or another order.

    outputs: of the model, which may have more than the data set has classes; those keep their numbers.
    """
    chosen = {
        new: old
        for old, new in (getattr(dataset, "label_map", None) or {}).items()
        if new != dataset.ignore_index
    }
    return np.array([chosen.get(index, index) for index in range(max(len(dataset.CLASSES), outputs))])


def _check_format(dataset: Any) -> None:
    """A submission file must be possible: tried with one of a single pixel, before anything is loaded; and each image must have its own. Raises ConfigError."""
    if isinstance(dataset, ConcatDataset):
        raise ConfigError(
            f"data.test joins {len(dataset.datasets)} data sets, and submission files are of one; keep one of them"
        )
    name, times = Counter(Path(info["filename"]).stem for info in dataset.img_infos).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"{times} images of data.test are called {name}, their submission files would overwrite each other; "
            "give data.test one folder at a time"
        )
    with tempfile.TemporaryDirectory() as place:
        try:
            dataset.format_results([np.zeros((1, 1), np.int64)], place, indices=[0])
        except NotImplementedError:
            raise ConfigError(
                f"{type(dataset).__name__} has no format for submissions; "
                "leave --format-only out, or use launch/predict.py for label maps"
            ) from None
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the submission files of {type(dataset).__name__} need the package {error.name}; pip install {error.name}"
            ) from None
