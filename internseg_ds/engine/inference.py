"""Segmenting with finished weights: a plain segmentor from any weight file, and image files through it. No DeepSpeed engine and no ZeRO."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmseg.datasets.pipelines import Compose
from torch import Tensor, nn

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_on_meta, fill
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.loading import fit_segmentor, resized
from internseg_ds.distributed.precision import apply_precision, backbone_dtype
from internseg_ds.distributed.process_group import World
from internseg_ds.engine.evaluator import images_of
from internseg_ds.engine.experiment import Experiment
from internseg_ds.engine.segmenting import Segmenter
from internseg_ds.errors import DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def load_trained(experiment: Experiment, checkpoint: str | os.PathLike, device: torch.device, *, ema: bool = False) -> nn.Module:
    """The segmentor of a config with the weights of `checkpoint` (.pth, .safetensors, or a ZeRO checkpoint directory), in eval mode on `device`.

    ema: of a ZeRO checkpoint, the averaged weights. The backbone is stored in the dtype in which it computes, the rest in fp32. Raises CheckpointError
    when the weights are not those of this model.
    """
    model = build_on_meta(experiment.model)
    compute = backbone_dtype(experiment.engine.backbone_dtype, device)
    found = fit_segmentor(model, open_weights(Path(checkpoint), ema=ema))

    def parameter(name: str, shape: torch.Size) -> Tensor:
        value = resized(model, name, found.weights.read(found.sources[name]), shape)
        return value.to(device, compute if name.startswith("backbone.") else torch.float32)

    def buffer(name: str, hollow: Tensor) -> Tensor:  # a batch norm's counter may be missing
        return found.weights.read(found.sources[name]).to(device) if name in found.sources else torch.zeros_like(hollow, device=device)

    fill(model, parameter, buffer)
    apply_precision(model, compute)
    return model.eval()


def predict(segmentor: nn.Module, dataset: "ImageFiles", world: World, workers: int, faults: list[str], *, strict: bool = False,
            logits: bool = False) -> Iterator[tuple[Path, np.ndarray, np.ndarray | None]]:
    """(path, labels (h, w) int64, logits (classes, h, w) float32 where asked for) of this rank's images: what an evaluation through the same pipeline gives.

    faults: takes what is wrong with images that cannot be read; under `strict` the first one ends the loop.
    """
    device = next(segmentor.parameters()).device
    images = images_of(dataset, world, workers, device, faults, strict=strict, truth=False, doing="segmenting")
    segmenter, stream = Segmenter(Forwards(segmentor)), ((image.index, image.inputs) for image in images)
    if logits:
        for index, labels, values in segmenter.labels_and_logits(stream):
            yield dataset.images[index], labels.cpu().numpy(), values.numpy()
    else:
        for index, labels in segmenter.labels(stream):
            yield dataset.images[index], labels.cpu().numpy(), None


class ImageFiles(torch.utils.data.Dataset):
    """Image files through an mmseg test pipeline."""

    def __init__(self, images: Sequence[Path], pipeline: Sequence[dict[str, Any]]) -> None:
        self.images, self.pipeline = images, Compose(pipeline)
        self.img_infos = [{"filename": str(path)} for path in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pipeline({"img_info": {"filename": str(self.images[index])}, "img_prefix": None, "seg_fields": []})


def find_images(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """The image files that `paths` name: files, globs ("frames/**/*.png"), and the images of folders; frame_2 before frame_10.

    Raises DataError when one is missing or nothing is found.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted((item for item in path.iterdir() if item.suffix.lower() in IMAGE_ENDINGS), key=_natural)
        elif path.is_file():
            found.append(path)
        elif glob.has_magic(str(path)):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            found += sorted((match for match in matches if match.suffix.lower() in IMAGE_ENDINGS and match.is_file()), key=_natural)
        else:
            raise DataError(f"there is no image or folder {path}")
    if not found:
        raise DataError(f"no image ({', '.join(IMAGE_ENDINGS)}) in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts numbers in names by value."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(path))]
