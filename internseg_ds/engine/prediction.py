"""What launch/predict.py does, for Python too: segment image files that are no data set.

In: a config, finished weights, and files, folders or globs, dealt out to the processes that a launcher started. Out: overlays, label maps, logits.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv import ConfigDict
from mmseg.datasets import DATASETS

from internseg_ds.data.image_files import ImageFiles, find_images, picture
from internseg_ds.data.loading import EvaluationImage
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import of_all_ranks, world_from_environment
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
from internseg_ds.errors import ConfigError, DataError, shortened

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
    written = {
        (folder / f"{name}_{kind}.png").resolve(): path
        for path, name in names.items()
        for kind in ("labels", "overlay")
    }
    if taken := [path for path in files if path.resolve() in written]:
        raise DataError(
            f"the prediction of {written[taken[0].resolve()]} would overwrite the image {taken[0]}; choose another --out"
        )
    dataset = ImageFiles(files, experiment.test["pipeline"])
    classes, palette = _classes(
        experiment,
        check_weights_fit(
            build_on_meta(experiment.model), checkpoint, ema=ema, check=experiment.engine.checksums
        ),
    )
    with joined(world):
        forwards = ready(experiment, checkpoint, world, ema=ema)
        faults: list[str] = []
        done = 0
        images = images_of(
            dataset,
            world,
            min(experiment.workers, len(files)),
            world.device,
            faults,
            strict=strict,
            truth=False,
            doing="segmenting",
        )
        dtype = np.uint8 if max(len(classes), forwards.segmentor.out_channels) <= 256 else np.uint16
        shrunk = Shrunk(files)
        for segmented in Segmenter(forwards, logits=logits).segment(shrunk.noting(images)):
            path, labels = files[segmented.key], segmented.labels.cpu().numpy()
            write_picture(folder / f"{names[path]}_labels.png", labels.astype(dtype))
            write_picture(
                folder / f"{names[path]}_overlay.png",
                side_by_side(picture(dataset, segmented.key), [("prediction", labels)], classes, palette),
            )
            if segmented.logits is not None:
                with whole_file(folder / f"{names[path]}_logits.npy") as file:
                    np.save(file, segmented.logits.numpy())
            done += 1
        total, _ = conclude(done, faults, world)
        shrunk.tell()
        log.info("%d images: overlays and label maps are in %s", total, folder)


class Shrunk:
    """Counts this rank's images that the test pipeline makes smaller, so that details of theirs are lost."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.images, self.found = files, 0, []

    def noting(self, images: Iterable[EvaluationImage]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The (index, inputs) of images, each looked at."""
        for image in images:
            sizes = [meta["img_shape"][:2] for metas in image.inputs["img_metas"] for meta in metas]
            size = image.inputs["img_metas"][0][0]["ori_shape"][:2]
            self.images += 1
            if max(sizes)[0] < size[0] or max(sizes)[1] < size[1]:
                self.found.append(
                    f"{self.files[image.index]} of {size[0]} x {size[1]} pixels as {max(sizes)[0]} x {max(sizes)[1]}"
                )
            yield image.index, image.inputs

    def tell(self) -> None:
        """One line for all ranks. Collective."""
        told = of_all_ranks((self.images, self.found))
        found = [name for _, names in told for name in names]
        if found:
            log.info(
                "%d of %d images are segmented at a smaller size than theirs, as the resizing of data.test.pipeline says (img_scale): %s; "
                "labels are brought back to the size of the image",
                len(found),
                sum(count for count, _ in told),
                shortened(found, 1),
            )


def _classes(
    experiment: Experiment, meta: Mapping[str, Any]
) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Names and colours: of the checkpoint's meta, else of the config's test set, or of its class in mmseg; needs no data."""
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


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What predictions are called: the file's name, with its folders where two files have one name. Raises DataError when that does not tell them apart."""
    names = {path: path.stem for path in files}
    if len(set(names.values())) < len(names):
        common = os.path.commonpath([path.absolute().parent for path in files])
        names = {path: "_".join(path.absolute().relative_to(common).with_suffix("").parts) for path in files}
    name, times = Counter(names.values()).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{times} images are called {name!r}, their predictions would overwrite each other; give them to separate calls"
        )
    return names
