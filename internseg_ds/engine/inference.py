"""Segmenting with finished weights: a plain segmentor from any weight file, evaluated or applied to images. No DeepSpeed engine and no ZeRO."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmseg.datasets.pipelines import Compose
from torch import Tensor, nn

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.data.loading import evaluation_batches
from internseg_ds.distributed.construction import build_on_meta, fill
from internseg_ds.distributed.loading import fit_segmentor, resized
from internseg_ds.distributed.precision import apply_precision, backbone_dtype
from internseg_ds.engine.evaluator import segment
from internseg_ds.engine.experiment import Experiment
from internseg_ds.engine.pictures import IGNORE, side_by_side
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


def predict(segmentor: nn.Module, experiment: Experiment, images: Sequence[Path], device: torch.device) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """(path, image (h, w, 3) uint8 BGR, labels (h, w) int64) for each image, through the config's test pipeline: the same labels as an evaluation gives."""
    dataset = ImageFiles(images, experiment.test["pipeline"])
    for index, inputs in evaluation_batches(dataset, rank=0, world_size=1, workers=min(experiment.workers, len(images)), device=device):
        yield images[index], cv2.imread(str(images[index])), segment(segmentor, inputs)


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
    """The image files that `paths` name: files, and the images of folders, sorted. Raises DataError when one is missing or nothing is found."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(item for item in path.iterdir() if item.suffix.lower() in IMAGE_ENDINGS)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no image or folder {path}")
    for path in found:
        if not cv2.haveImageReader(str(path)):
            raise DataError(f"{path} is no image that OpenCV can read; leave it out, or copy it again")
    if not found:
        raise DataError(f"no image ({', '.join(IMAGE_ENDINGS)}) in {', '.join(map(str, paths))}")
    return found


class Shower:
    """Writes image | ground truth | prediction as PNGs while an evaluation runs: the first `count` images of the data set."""

    def __init__(self, dataset: Any, folder: Path, count: int) -> None:
        self.dataset, self.folder, self.count = dataset, folder, count
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, index: int, labels: np.ndarray) -> None:
        if index >= self.count:
            return
        name = self.dataset.img_infos[index]["filename"]
        image = cv2.imread(str(Path(self.dataset.img_dir) / name))
        truth = self.dataset.get_gt_seg_map_by_idx(index)
        if self.dataset.reduce_zero_label:  # as mmseg's metrics do: label 0 means none of the classes
            truth = np.where(truth == 0, IGNORE, truth - 1)
        picture = side_by_side(image, [("ground truth", truth), ("prediction", labels)], self.dataset.CLASSES, self.dataset.PALETTE)
        cv2.imwrite(str(self.folder / Path(name).with_suffix(".png").name), picture)
