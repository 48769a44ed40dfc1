"""What launch/predict.py does, as a Python function: segment image files that are no data set.

In: a config, trained weights, and files, folders or globs, split over the processes that a launcher started.
Out: overlays, label maps, logits.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmcv import ConfigDict
from mmseg.datasets import DATASETS

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.data.image_files import ImageFiles, find_images, picture
from internseg_ds.data.loading import EvaluationImage
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import gather_from_ranks
from internseg_ds.errors import ConfigError, DataError, are, counted, shortened
from internseg_ds.evaluation.evaluator import ReadableImages
from internseg_ds.evaluation.inference import InferenceRun, trained_segmentor
from internseg_ds.evaluation.sliding_window import ImagePrediction, SlidingWindowInference
from internseg_ds.evaluation.visualization import Palette, side_by_side
from internseg_ds.output_files import make_folder, output_folder, whole_file, write_picture
from internseg_ds.preflight.model_checks import check_channels

log = logging.getLogger(__name__)


def predict_files(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    images: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    logits: bool = False,
    strict: bool = False,
    ema: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> None:
    """Write NAME_overlay.png and NAME_labels.png (class indices as in the training labels) into `out` for
    every image.

    images: files, folders and globs. logits: NAME_logits.npy too, (classes, h, w) float32. strict: an image
    that cannot be read is an error; otherwise it is left out and named at the end. Raises UserError when
    config, images or checkpoint cannot work, or when two images would write the same file.
    """
    run = InferenceRun.open(config, checkpoint, ema=ema, cfg_options=cfg_options)
    folder = output_folder(out, "--out")
    files = find_images(images)
    names = _names(files)
    _check_no_input_is_overwritten(files, names, folder)
    dataset = ImageFiles(files, test_pipeline(run.experiment))
    meta_model = build_on_meta(run.experiment.model)
    check_channels(meta_model, dataset.pipeline.transforms, "data.test")
    meta = run.check_weights(meta_model)
    classes, palette = classes_of(run.experiment, meta)
    with trained_segmentor(run) as forwards:
        readable = ReadableImages(
            dataset,
            run.world,
            min(run.experiment.workers, len(files)),
            run.world.device,
            strict=strict,
            truth=False,
            doing="segmenting",
        )
        downscaled = DownscaledImages(files)
        inference = SlidingWindowInference(forwards, logits=logits)
        writer = _PredictionWriter(
            folder,
            classes,
            palette,
            np.dtype(np.uint8 if max(len(classes), inference.outputs) <= 256 else np.uint16),
        )
        done = 0
        for prediction in inference.predict(downscaled.record(readable)):
            image = picture(dataset, prediction.key)
            writer.write(names[files[prediction.key]], image, prediction)
            done += 1
        total, _ = readable.totals(done)
        downscaled.log_summary()
        log.info("%s: overlays and label maps are in %s", counted(total, "image"), folder)


@dataclass(frozen=True)
class _PredictionWriter:
    """Writes what is predicted of an image."""

    folder: Path
    classes: Sequence[str]
    palette: Palette
    label_dtype: np.dtype
    """Of the label maps: uint8 where it has a value for every output of the model, else uint16."""

    def write(self, name: str, image: np.ndarray, prediction: ImagePrediction) -> None:
        """name: prefix of the files. image: (h, w, 3) uint8 BGR."""
        make_folder(self.folder)
        labels = prediction.labels.cpu().numpy()
        write_picture(self.folder / f"{name}_labels.png", labels.astype(self.label_dtype))
        overlay = side_by_side(image, [("prediction", labels)], self.classes, self.palette)
        write_picture(self.folder / f"{name}_overlay.png", overlay)
        if prediction.logits is not None:
            with whole_file(self.folder / f"{name}_logits.npy") as file:
                np.save(file, prediction.logits.numpy())


def _check_no_input_is_overwritten(files: Sequence[Path], names: Mapping[Path, str], folder: Path) -> None:
    """Raise DataError where a prediction would be written in the place of an image."""
    written = {
        (folder / f"{name}_{kind}.png").resolve(): path
        for path, name in names.items()
        for kind in ("labels", "overlay")
    }
    for path in files:
        if path.resolve() in written:
            raise DataError(
                f"the prediction of {written[path.resolve()]} would overwrite the image {path}; choose "
                "another --out"
            )


class DownscaledImages:
    """Counts this rank's images that the test pipeline makes smaller, so that details are lost."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.images = 0
        self.downscaled: list[str] = []

    def record(self, images: Iterable[EvaluationImage]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, inputs) of each image, after comparing its sizes."""
        for image in images:
            # the largest of its test-time augmentations
            height, width = max(
                meta["img_shape"][:2] for metas in image.inputs["img_metas"] for meta in metas
            )
            original = image.inputs["img_metas"][0][0]["ori_shape"][:2]
            self.images += 1
            if height < original[0] or width < original[1]:
                self.downscaled.append(
                    f"{self.files[image.index]} of {original[0]} x {original[1]} pixels as {height} x {width}"
                )
            yield image.index, image.inputs

    def log_summary(self) -> None:
        """Log one line for all ranks. Collective."""
        by_rank = gather_from_ranks((self.images, self.downscaled))
        downscaled = [name for _, names in by_rank for name in names]
        if downscaled:
            log.info(
                "%d of %s %s segmented at a smaller size than the original, as the resizing of "
                "data.test.pipeline says (img_scale): %s; labels are brought back to the size of the image",
                len(downscaled),
                counted(sum(count for count, _ in by_rank), "image"),
                are(len(downscaled)),
                shortened(downscaled, 1),
            )


def classes_of(experiment: Experiment, meta: Mapping[str, Any]) -> tuple[Sequence[str], Palette]:
    """Names and colours of the classes: of the checkpoint's metadata `meta`, else of the config's test
    set, else of its class in mmseg. Reads no data."""
    (entry, *_) = leaf_datasets(experiment.test) if experiment.test is not None else (ConfigDict(),)
    kind = DATASETS.get(entry.get("type", ""))
    classes = meta.get("CLASSES") or entry.get("classes") or getattr(kind, "CLASSES", None)
    palette = meta.get("PALETTE") or entry.get("palette") or getattr(kind, "PALETTE", None)
    if (
        not isinstance(classes, (list, tuple))
        or not isinstance(palette, (list, tuple))
        or len(classes) != len(palette)
    ):
        raise ConfigError(
            f"neither the checkpoint nor data.test of {experiment.path} names the classes and their colours; "
            "add classes=(...) and palette=[...] to data.test"
        )
    return classes, palette


def test_pipeline(experiment: Experiment) -> list[Any]:
    """The steps that read an image. Raises ConfigError for a config without data to test on."""
    if experiment.test is None:
        raise ConfigError(
            f"data of {experiment.path} has neither a 'test' nor a 'val' entry, whose pipeline says how images "
            "are read; add one"
        )
    return experiment.test["pipeline"]


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """A prefix for the files of each image's prediction: the file's name, with its folders where two files
    have one name. Raises DataError when that is not unique."""
    names = {path: path.stem for path in files}
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([path.absolute().parent for path in files])
        names = {path: "_".join(path.absolute().relative_to(common).with_suffix("").parts) for path in files}
    name, times = Counter(names.values()).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{times} images are called {name!r}, their predictions would overwrite each other; give them "
            "to separate calls"
        )
    return names
