"""What launch/predict.py does, for Python too: segment image files that are no data set.

In: a config, finished weights, and files, folders or globs, dealt out to the processes that a launcher started. Out: overlays, label maps, logits.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmcv import ConfigDict
from mmseg.datasets import DATASETS

from internseg_ds.data.image_files import ImageFiles, find_images
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import world_from_environment
from internseg_ds.distributed.watch import joined
from internseg_ds.engine.evaluator import conclude, images_of
from internseg_ds.engine.experiment import Experiment, leaf_datasets, read_experiment
from internseg_ds.engine.inference import ready
from internseg_ds.engine.model_checks import check_windows
from internseg_ds.engine.outputs import output_folder, whole_file, write_picture
from internseg_ds.engine.pictures import side_by_side
from internseg_ds.engine.segmenting import Segmenter
from internseg_ds.engine.starting_weights import check_weights_fit
from internseg_ds.engine.trackers import start_logging
from internseg_ds.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def predict_files(config: str | os.PathLike, checkpoint: str | os.PathLike, images: Sequence[str | os.PathLike], out: str | os.PathLike, *,
                  logits: bool = False, strict: bool = False, ema: bool = False, cfg_options: Mapping[str, Any] | None = None) -> None:
    """Writes NAME_overlay.png and NAME_labels.png (class indices as the training labels count them) into `out` for every image.

    images: files, folders and globs. logits: NAME_logits.npy too, (classes, h, w) float32. strict: an image that cannot be read is an error; else it is
    left out and named at the end.
    Raises UserError when config, images or checkpoint cannot work, or when two images would write the same file.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    start_logging(None, level=experiment.log_level, is_main=world.is_main)
    folder = output_folder(out, "--out")
    check_windows(experiment)
    files = find_images(images)
    names = _names(files)
    written = {(folder / f"{name}_{kind}.png").resolve(): path for path, name in names.items() for kind in ("labels", "overlay")}
    if taken := [path for path in files if path.resolve() in written]:
        raise DataError(f"the prediction of {written[taken[0].resolve()]} would overwrite the image {taken[0]}; choose another --out")
    dataset = ImageFiles(files, experiment.test["pipeline"])
    classes, palette = _classes(experiment, check_weights_fit(build_on_meta(experiment.model), checkpoint, ema=ema))
    with joined(world):
        forwards = ready(experiment, checkpoint, world, ema=ema)
        faults: list[str] = []
        done = 0
        images = images_of(dataset, world, min(experiment.workers, len(files)), world.device, faults, strict=strict, truth=False, doing="segmenting")
        for segmented in Segmenter(forwards, logits=logits).segment((image.index, image.inputs) for image in images):
            path, labels = files[segmented.key], segmented.labels.cpu().numpy()
            picture = side_by_side(mmcv.imread(path), [("prediction", labels)], classes, palette)
            write_picture(folder / f"{names[path]}_labels.png", labels.astype(np.uint8 if len(classes) < 256 else np.uint16))
            write_picture(folder / f"{names[path]}_overlay.png", picture)
            if segmented.logits is not None:
                with whole_file(folder / f"{names[path]}_logits.npy") as file:
                    np.save(file, segmented.logits.numpy())
            done += 1
        total, _ = conclude(done, faults, world)
        log.info("%d images: overlays and label maps are in %s", total, folder)


def _classes(experiment: Experiment, meta: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Names and colours: of the checkpoint's meta, else of the config's test set, or of its class in mmseg; needs no data."""
    (entry, *_) = leaf_datasets(experiment.test) if experiment.test is not None else (ConfigDict(),)
    kind = DATASETS.get(entry.get("type", ""))
    classes = meta.get("CLASSES") or entry.get("classes") or getattr(kind, "CLASSES", None)
    palette = meta.get("PALETTE") or entry.get("palette") or getattr(kind, "PALETTE", None)
    if not isinstance(classes, (list, tuple)) or not isinstance(palette, (list, tuple)) or len(classes) != len(palette):
        raise ConfigError(f"neither the checkpoint nor data.test of {experiment.path} names the classes and their colours; "
                          "add classes=(...) and palette=[...] to data.test")
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
