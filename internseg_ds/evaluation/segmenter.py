"""A trained segmentor in three lines of Python.

    segmenter = Segmenter.from_pretrained("work_dirs/demo")
    result = segmenter("image.jpg")
    result.picture.save("segmented.png")

In: weights with the config that is stored with them, and images as paths, PIL images or arrays. Out: labels, scores
and pictures; the labels are those of launch/test.py and launch/predict.py, for the images take the same way.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from internseg_ds.checkpoints.weights import Weights, open_weights
from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.data.image_files import GivenImages, picture
from internseg_ds.data.loading import evaluation_images
from internseg_ds.device import device_type
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.precision import set_fp32_matmul
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import CheckpointError, ConfigError, DataError
from internseg_ds.evaluation.huggingface import from_folder, stored_experiment, without_auxiliary_heads
from internseg_ds.evaluation.inference import with_weights
from internseg_ds.evaluation.predict import classes_of, test_pipeline
from internseg_ds.evaluation.scenes.blending import Blend
from internseg_ds.evaluation.scenes.outputs import SceneOutputs, check_free, outputs_of
from internseg_ds.evaluation.scenes.pixel_steps import PixelSteps
from internseg_ds.evaluation.scenes.scene_file import Scene
from internseg_ds.evaluation.scenes.segmentation import SceneOptions, SceneSegmentation, check_slides
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.evaluation.visualization import Palette, overlay
from internseg_ds.output_files import make_folder, output_folder
from internseg_ds.preflight.model_checks import check_channels, check_windows

FEW_LABELS = 256
"""That uint8 has a value for."""


@dataclass(frozen=True)
class Segmentation:
    """The result for one image of (h, w) pixels."""

    labels: np.ndarray
    """(h, w): the class of each pixel, uint8, or int16 of a model with more than 256 outputs."""
    scores: np.ndarray
    """(h, w) float32: the probability of that class, by the softmax of the logits."""
    classes: Sequence[str]
    """Their names, by number."""
    palette: Palette
    """Their colours (r, g, b), 0 to 255."""
    image: np.ndarray
    """(h, w, 3) uint8 BGR, as it was read."""

    @cached_property
    def picture(self) -> Image.Image:
        """The image in the colours of its classes, (h, w) RGB."""
        tinted = overlay(self.image, self.labels, self.palette)
        return Image.fromarray(np.ascontiguousarray(tinted[..., ::-1]))


class Segmenter:
    """A trained segmentor with all that it needs to segment images. Made by `from_pretrained`."""

    def __init__(
        self, experiment: Experiment, segmentor: torch.nn.Module, classes: Sequence[str], palette: Palette
    ) -> None:
        self.classes = tuple(classes)
        self.palette = tuple(tuple(map(int, colour)) for colour in palette)
        self._segmentor = segmentor
        self._pipeline = test_pipeline(experiment)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        config: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        ema: bool = False,
    ) -> "Segmenter":
        """source: a work directory or a ZeRO checkpoint in it, a .pth, .safetensors or folder that
        launch/consolidate.py has written, also with --format huggingface. config: an experiment config, where the
        weights carry none, or in place of theirs. device: default a GPU where there is one. ema: of a ZeRO checkpoint,
        the averaged weights.

        Raises CheckpointError for what is no weights or lacks a config, ConfigError for a config that cannot work.
        """
        target = _device(device)
        experiment, weights, meta = open_trained(source, config=config, ema=ema)
        set_fp32_matmul(experiment.engine.fp32_matmul, target)
        return cls(experiment, with_weights(experiment, weights, target), *classes_of(experiment, meta))

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Segmentation]: ...

    @overload
    def __call__(self, images: str | os.PathLike | Image.Image | np.ndarray) -> Segmentation: ...

    def __call__(self, images: Any) -> Segmentation | list[Segmentation]:
        """images: a path, a PIL image, or an array (h, w, 3) uint8 of RGB; or a list of them, whose windows share
        forward passes, and whose results come in a list.

        Raises DataError for what is no image, or cannot be read.
        """
        if isinstance(images, (list, tuple)):
            return list(self._segment(images))
        (found,) = self._segment([images])
        return found

    def segment_scene(
        self,
        scene: str | os.PathLike,
        out: str | os.PathLike,
        *,
        shapes: bool = False,
        blend: Blend = "mean",
        memory_gib: float | None = None,
    ) -> SceneOutputs:
        """Segment an image of any size by windows, in bounded memory, as launch/predict.py --scenes does: a GeoTIFF
        NAME_labels.tif in the folder `out`, with the georeference of the scene.

        shapes: NAME_shapes.geojson too. blend, memory_gib: as of `SceneOptions`. Raises DataError for what cannot be
        read, ConfigError for a model without windows, OutputError where there is a result already or no room.
        """
        folder = output_folder(out, "out=")
        check_slides(self._segmentor.test_cfg, "this model")
        outputs = outputs_of(Path(scene), folder, shapes=shapes)
        check_free(outputs)
        device = next(self._segmentor.parameters()).device
        segmentation = SceneSegmentation(
            SlidingWindowInference(Forwards(self._segmentor)),
            list(self.classes),
            self.palette,
            SceneOptions(blend, shapes, memory_gib),
            World(),
            device,
        )
        with Scene(Path(scene), PixelSteps.of(self._pipeline)) as opened, torch.no_grad():
            opened.check_model(self._segmentor)
            make_folder(folder)
            segmentation.segment(opened, outputs)
        return outputs

    @torch.no_grad()
    def _segment(self, images: Sequence[Any]) -> Iterator[Segmentation]:
        dataset = GivenImages(images, self._pipeline)
        check_channels(self._segmentor, dataset.pipeline.transforms, "data.test")
        inference = SlidingWindowInference(Forwards(self._segmentor), scores=True)
        dtype = np.uint8 if max(len(self.classes), inference.outputs) <= FEW_LABELS else np.int16
        for prediction in inference.predict(self._inputs(dataset)):
            if prediction.scores is None:
                raise RuntimeError("this inference was to make scores")
            yield Segmentation(
                prediction.labels.cpu().numpy().astype(dtype),
                prediction.scores.cpu().numpy(),
                self.classes,
                self.palette,
                picture(dataset, prediction.key),
            )

    def _inputs(self, dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        device = next(self._segmentor.parameters()).device
        for image in evaluation_images(dataset, rank=0, world_size=1, workers=0, device=device, truth=False):
            if image.fault:
                raise DataError(image.fault)
            yield image.index, image.inputs


def open_trained(
    source: str | os.PathLike, *, config: str | os.PathLike | None, ema: bool, check: bool = True
) -> tuple[Experiment, Weights, Mapping[str, Any]]:
    """The experiment of a trained segmentor, its weights, of which nothing is read yet, and their metadata.

    Arguments are those of `Segmenter.from_pretrained`, check that of `open_weights`. Raises what that raises.
    """
    weights = open_weights(Path(source), ema=ema, check=check)
    experiment = _experiment(weights, Path(source), config)
    check_windows(experiment)
    meta = weights.meta
    if weights.config is not None:
        experiment = without_auxiliary_heads(experiment)
        weights = from_folder(weights, build_on_meta(experiment.model))
    return experiment, weights, meta


def _device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, or this machine's. Raises ConfigError for one that torch does not have."""
    try:
        found = torch.device(device_type() if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is none of torch's; write 'cpu', 'cuda' or 'cuda:1'") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r}: models run on CPUs and on GPUs here; write 'cpu' or 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but torch {torch.__version__} sees no GPU; write device='cpu'")
    return found


def _experiment(weights: Weights, source: Path, config: str | os.PathLike | None) -> Experiment:
    """Of `config`, or else of what is stored with the weights."""
    if config is not None:
        return read_experiment(config)
    try:
        return stored_experiment(weights.meta, source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or give the config: from_pretrained({str(source)!r}, config=PATH)"
        ) from None
