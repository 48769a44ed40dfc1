"""What launch/test.py and launch/predict.py do, for Python too: evaluate finished weights on a config's test set, or segment image files."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from internseg_ds.distributed.process_group import joined, world_from_environment
from internseg_ds.engine.evaluator import Evaluation, evaluate
from internseg_ds.engine.experiment import known_metrics, read_experiment
from internseg_ds.engine.inference import Shower, find_images, load_trained, predict
from internseg_ds.engine.pictures import side_by_side
from internseg_ds.engine.preflight import check_weights_fit, validation_set
from internseg_ds.engine.trackers import start_logging
from internseg_ds.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def test(config: str | os.PathLike, checkpoint: str | os.PathLike, *, metrics: Sequence[str] | None = None, out: str | os.PathLike | None = None,
         show_dir: str | os.PathLike | None = None, show_count: int = 20, ema: bool = False,
         cfg_options: Mapping[str, Any] | None = None) -> Evaluation:
    """Evaluates `checkpoint` on the config's test set; collective. out: JSON file for the metrics. show_dir: folder for the first `show_count` overlays.
    ema: of a ZeRO checkpoint, the averaged weights.

    Raises UserError when config, data or checkpoint cannot work, before any process takes its device.
    """
    world = world_from_environment()
    experiment = read_experiment(config, cfg_options)
    metrics = known_metrics(tuple(metrics), "--eval") if metrics else experiment.metrics
    if out is not None and Path(out).is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a JSON file in it")
    dataset = validation_set(experiment, "test")
    check_weights_fit(experiment, checkpoint, ema=ema)
    with joined(world):
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        segmentor = load_trained(experiment, checkpoint, world.device, ema=ema)
        show = Shower(dataset, Path(show_dir), show_count) if show_dir is not None else None
        result = evaluate(segmentor, dataset, world=world, workers=experiment.workers, metrics=metrics, each=show)
        if world.is_main:
            log.info("%s: %s", checkpoint, ", ".join(f"{name} {100 * value:.2f}" for name, value in result.metrics.items() if "." not in name))
            if out is not None:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                Path(out).write_text(json.dumps(result.metrics, indent=1) + "\n")
    return result


def predict_files(config: str | os.PathLike, checkpoint: str | os.PathLike, images: Sequence[str | os.PathLike], out: str | os.PathLike, *,
                  cfg_options: Mapping[str, Any] | None = None) -> None:
    """Writes NAME_overlay.png and NAME_labels.png (uint8 class indices, as the training labels count them) into `out` for every image.

    Raises UserError when config, images or checkpoint cannot work, or when two images would write the same file.
    """
    experiment = read_experiment(config, cfg_options)
    files = find_images(images)
    stem, times = Counter(path.stem for path in files).most_common(1)[0]
    if times > 1:
        raise DataError(f"{times} images are called {stem!r}, their predictions would overwrite each other; give them to separate calls")
    written = {(Path(out) / f"{path.stem}_{kind}.png").resolve(): path for path in files for kind in ("labels", "overlay")}
    if taken := [path for path in files if path.resolve() in written]:
        raise DataError(f"the prediction of {written[taken[0].resolve()]} would overwrite the image {taken[0]}; choose another --out")
    weights_meta = check_weights_fit(experiment, checkpoint)
    classes, palette = weights_meta.get("CLASSES"), weights_meta.get("PALETTE")
    if not classes or not palette:
        dataset = validation_set(experiment, "test")
        classes, palette = dataset.CLASSES, dataset.PALETTE
    device = world_from_environment().device
    start_logging(None, level=experiment.log_level, is_main=True)
    segmentor = load_trained(experiment, checkpoint, device)
    Path(out).mkdir(parents=True, exist_ok=True)
    for path, image, labels in track(predict(segmentor, experiment, files, device), "segmenting", total=len(files)):
        cv2.imwrite(str(Path(out) / f"{path.stem}_labels.png"), labels.astype(np.uint8))
        cv2.imwrite(str(Path(out) / f"{path.stem}_overlay.png"), side_by_side(image, [("prediction", labels)], classes, palette))
    log.info("%d images: overlays and label maps are in %s", len(files), out)
