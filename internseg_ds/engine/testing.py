"""What launch/test.py and launch/predict.py do, for Python too: evaluate finished weights on a config's test set, or segment image files.

Both split the images over the processes that a launcher started.
"""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch.distributed as dist
from mmcv import ConfigDict
from mmseg.datasets import DATASETS

from internseg_ds.data.image_files import ImageFiles, find_images
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import World, joined, world_from_environment
from internseg_ds.engine.evaluator import Evaluation, complain, evaluate, images_of
from internseg_ds.engine.experiment import Experiment, known_metrics, leaf_datasets, read_experiment
from internseg_ds.engine.inference import predict, ready
from internseg_ds.engine.outputs import make_folder, whole_file, write_picture
from internseg_ds.engine.pictures import side_by_side
from internseg_ds.engine.preflight import check_classes, check_weights_fit, check_windows, validation_set
from internseg_ds.engine.report import Extremes, Shower, write_report
from internseg_ds.engine.segmenting import Segmenter
from internseg_ds.engine.trackers import start_logging
from internseg_ds.errors import ConfigError, DataError, OutputError

log = logging.getLogger(__name__)


def test(config: str | os.PathLike, checkpoint: str | os.PathLike, *, metrics: Sequence[str] | None = None, out: str | os.PathLike | None = None,
         extremes: int = 5, show_dir: str | os.PathLike | None = None, show_count: int = 20, strict: bool = False, ema: bool = False,
         cfg_options: Mapping[str, Any] | None = None) -> Evaluation:
    """Evaluates `checkpoint` on the config's test set; collective.

    out: folder for results.json, per_class.csv, confusion.png and overlays of the `extremes` best and worst images. show_dir: folder for the first
    `show_count` overlays. strict: an image that cannot be read is an error. ema: of a ZeRO checkpoint, the averaged weights.
    Raises UserError when config, data or checkpoint cannot work, before any process takes its device.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    metrics = known_metrics(tuple(metrics), "--eval") if metrics else experiment.metrics
    folder = _folder(out, "--out") if out is not None else None
    shown = _folder(show_dir, "--show-dir") if show_dir is not None else None
    check_windows(experiment)
    dataset = validation_set(experiment, "test")
    check_classes(build_on_meta(experiment.model), dataset, "data.test")
    check_weights_fit(experiment, checkpoint, ema=ema)
    with joined(world):
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        forwards = ready(experiment, checkpoint, world, ema=ema)
        extreme = Extremes(dataset, extremes) if folder is not None else None
        shower = Shower(dataset, shown, show_count) if shown is not None else None
        watchers = [watcher for watcher in (extreme, shower) if watcher is not None]
        result = evaluate(forwards, dataset, world=world, workers=experiment.workers, metrics=metrics, strict=strict, watchers=watchers)
        if world.is_main:
            log.info("%s: %s", checkpoint, ", ".join(f"{name} {100 * value:.2f}" for name, value in result.metrics.items() if "." not in name))
        if extreme is not None:
            if world.is_main:
                write_report(result, dataset.CLASSES, folder)
            extreme.write(folder, world)
    return result


def write_submission(config: str | os.PathLike, checkpoint: str | os.PathLike, out: str | os.PathLike, *, strict: bool = False, ema: bool = False,
                     cfg_options: Mapping[str, Any] | None = None) -> None:
    """Writes the files that the benchmark of the config's test set takes (mmseg's `format_results`) into the folder `out`; needs no ground truth. Collective.

    Raises UserError as `test` does, and for a data set without such a format.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    folder = _folder(out, "--format-only")
    check_windows(experiment)
    dataset = validation_set(experiment, "test", truth=False)
    check_classes(build_on_meta(experiment.model), dataset, "data.test")
    _check_format(dataset)
    check_weights_fit(experiment, checkpoint, ema=ema)
    with joined(world):
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        forwards = ready(experiment, checkpoint, world, ema=ema)
        faults: list[str] = []
        images = images_of(dataset, world, experiment.workers, world.device, faults, strict=strict, truth=False, doing="segmenting")
        written = 0
        for segmented in Segmenter(forwards).segment((image.index, image.inputs) for image in images):
            try:
                dataset.format_results([segmented.labels.cpu().numpy()], str(folder), indices=[segmented.key])
            except OSError as error:
                raise OutputError(f"the submission files in {folder} cannot be written: {error.strerror or error}; make room there, or choose another folder") from error
            written += 1
        _end(written, faults, world, f"submission files of {type(dataset).__name__} are in {folder}")


def predict_files(config: str | os.PathLike, checkpoint: str | os.PathLike, images: Sequence[str | os.PathLike], out: str | os.PathLike, *,
                  logits: bool = False, strict: bool = False, ema: bool = False, cfg_options: Mapping[str, Any] | None = None) -> None:
    """Writes NAME_overlay.png and NAME_labels.png (class indices as the training labels count them) into `out` for every image.

    images: files, folders and globs. logits: NAME_logits.npy too, (classes, h, w) float32. strict: an image that cannot be read is an error; else it is
    left out and named at the end.
    Raises UserError when config, images or checkpoint cannot work, or when two images would write the same file.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    folder = _folder(out, "--out")
    check_windows(experiment)
    files = find_images(images)
    names = _names(files)
    written = {(folder / f"{name}_{kind}.png").resolve(): path for path, name in names.items() for kind in ("labels", "overlay")}
    if taken := [path for path in files if path.resolve() in written]:
        raise DataError(f"the prediction of {written[taken[0].resolve()]} would overwrite the image {taken[0]}; choose another --out")
    dataset = ImageFiles(files, experiment.test["pipeline"])
    classes, palette = _classes(experiment, check_weights_fit(experiment, checkpoint, ema=ema))
    with joined(world):
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        forwards = ready(experiment, checkpoint, world, ema=ema)
        faults: list[str] = []
        done = 0
        for path, labels, values in predict(forwards, dataset, world, min(experiment.workers, len(files)), faults, strict=strict, logits=logits):
            picture = side_by_side(mmcv.imread(path), [("prediction", labels)], classes, palette)
            write_picture(folder / f"{names[path]}_labels.png", labels.astype(np.uint8 if len(classes) < 256 else np.uint16))
            write_picture(folder / f"{names[path]}_overlay.png", picture)
            if values is not None:
                with whole_file(folder / f"{names[path]}_logits.npy") as file:
                    np.save(file, values)
            done += 1
        _end(done, faults, world, f"overlays and label maps are in {folder}")


def _check_format(dataset: Any) -> None:
    """A submission file must be possible: tried with one of a single pixel, before anything is loaded; and each image must have its own. Raises ConfigError."""
    name, times = Counter(Path(info["filename"]).stem for info in dataset.img_infos).most_common(1)[0]
    if times > 1:
        raise ConfigError(f"{times} images of data.test are called {name}, their submission files would overwrite each other; give data.test one folder at a time")
    with tempfile.TemporaryDirectory() as place:
        try:
            dataset.format_results([np.zeros((1, 1), np.int64)], place, indices=[0])
        except NotImplementedError:
            raise ConfigError(f"{type(dataset).__name__} has no format for submissions; leave --format-only out, or use launch/predict.py for label maps") from None
        except ModuleNotFoundError as error:
            raise ConfigError(f"the submission files of {type(dataset).__name__} need the package {error.name}; pip install {error.name}") from None


def _classes(experiment: Experiment, meta: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Names and colours: of the checkpoint's meta, else of the config's test set, or of its class in mmseg; needs no data."""
    (entry, *_) = leaf_datasets(experiment.test) if experiment.test is not None else (ConfigDict(),)
    kind = DATASETS.get(entry.get("type", ""))
    classes = meta.get("CLASSES") or entry.get("classes") or getattr(kind, "CLASSES", None)
    palette = meta.get("PALETTE") or entry.get("palette") or getattr(kind, "PALETTE", None)
    if not isinstance(classes, (list, tuple)) or not isinstance(palette, (list, tuple)) or len(classes) != len(palette):
        raise ConfigError(f"neither the checkpoint nor data.test of {experiment.path} names the classes and their colours; add classes=(...) and palette=[...] to data.test")
    return classes, palette


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What predictions are called: the file's name, with its folders where two files have one name. Raises DataError when that does not tell them apart."""
    names = {path: path.stem for path in files}
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([path.absolute().parent for path in files])
        names = {path: "_".join(path.absolute().relative_to(common).with_suffix("").parts) for path in files}
    name, times = Counter(names.values()).most_common(1)[0]
    if times > 1:
        raise DataError(f"{times} images are called {name!r}, their predictions would overwrite each other; give them to separate calls")
    return names


def _folder(path: str | os.PathLike, option: str) -> Path:
    """A folder that can be written, made where there is none. Raises ConfigError or OutputError when there is something else in its place."""
    folder = Path(path)
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"{option} {folder} cannot be written: {place} is no folder that this user may write to")
    make_folder(folder)
    return folder


def _end(done: int, faults: list[str], world: World, words: str) -> None:
    """Counts what all ranks have done, complains of images that could not be read, and says where the rest is. Collective."""
    told: list[Any] = [(done, faults)]
    if dist.is_initialized() and world.size > 1:
        told = [None] * world.size
        dist.all_gather_object(told, (done, faults))
    done = sum(number for number, _ in told)
    complain(sorted(fault for _, some in told for fault in some), done, aloud=world.is_main)
    log.info("%d images: %s", done, words)
