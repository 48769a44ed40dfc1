"""From mmseg data-set configs to batches of tensors.

Training batches come from an endless, seeded stream: which images, and how each is cropped, flipped and coloured, depends on the seed and the image's
position in the stream alone (not on workers, ranks or restarts). Evaluation batches are single images, dealt out to the ranks in turn.
"""

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.parallel import DataContainer, collate
from mmseg.datasets import build_dataset
from mmseg.datasets.pipelines import LoadAnnotations
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import internseg_ds.data.ade20k  # noqa: F401 - registers the published few-shot data set
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.data.transforms import CheckAnnotation
from internseg_ds.errors import DataError, FaultError
from internseg_ds.seeding import derived_seed

REPLACEMENTS = 20
"""Images that are tried for one place of the stream, before all of them are taken for damaged."""


@dataclass(frozen=True)
class EvaluationImage:
    """One image of an evaluation. fault: why it could not be read, naming it; the rest is empty then."""

    index: int
    inputs: dict[str, Any]
    """What the segmentor's forward(return_loss=False) takes: img, a list over test-time augmentations of (1, 3, h, w) float32, and img_metas, a list over
    augmentations of lists of one dict."""
    truth: Tensor | None = None
    """Class of each pixel of the original image, `ignore_index` of the data set for none: (h, w) uint8."""
    fault: str | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of training images, and where it stands in the stream."""

    inputs: dict[str, Any]
    """What the segmentor's forward takes: img (b, 3, h, w) float32, gt_semantic_seg (b, 1, h, w) int64 with 255 for "ignore", img_metas."""
    position: int
    """Stream position of its first image."""
    faults: tuple[str, ...] = ()
    """What was wrong with images that stood here in the stream, and were replaced by others."""

    @property
    def files(self) -> list[str]:
        return [meta["filename"] for meta in self.inputs["img_metas"]]


def build_datasets(entry: Any, what: str, leaves: list[Any], **default_args: Any) -> Dataset:
    """mmseg's data set of a config entry, after a look at its folders.

    what: its name in messages ("data.train"). leaves: the plain data sets inside wrappers. Raises DataError when a folder is missing or the set is empty.
    """
    for leaf in leaves:
        root = Path(leaf.get("data_root") or "")
        for key in ("img_dir", "ann_dir"):
            folders = leaf.get(key) or []
            for folder in folders if isinstance(folders, (list, tuple)) else [folders]:  # mmseg joins the data sets of several folders
                if not (root / folder).is_dir():
                    raise DataError(f"{what}: there is no folder {root / folder} ({key} = {folder!r} under data_root = {leaf.get('data_root')!r}); "
                                    f"put the data there, or set {what}.data_root")
    try:
        dataset = build_dataset(entry, default_args or None)
    except (KeyError, TypeError, AttributeError, AssertionError, OSError, ValueError) as error:
        raise DataError(f"{what} cannot be built: {type(error).__name__}: {error}") from error
    for part in _plain(dataset):
        if getattr(part, "label_map", None):  # of classes that the config leaves out; mmseg's -1 is no uint8, which numpy 2 minds
            part.label_map = {old: 255 if new == -1 else new for old, new in part.label_map.items()}
        _check_annotations_of(part)
    _annotations_are_there(dataset, what)
    if len(dataset) == 0:
        places = ", ".join(f"{leaf.get('data_root')}/{leaf.get('img_dir')}/*{leaf.get('img_suffix', '.jpg')}" for leaf in leaves)
        raise DataError(f"{what} is empty: no image matches {places}")
    return dataset


def _plain(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets inside wrappers, in their order."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from _plain(part)
    elif hasattr(dataset, "dataset"):
        yield from _plain(dataset.dataset)
    else:
        yield dataset


def _check_annotations_of(dataset: Dataset) -> None:
    """Has each label map that the pipeline loads looked at, before anything is done to it."""
    transforms = dataset.pipeline.transforms
    for place, transform in reversed(list(enumerate(transforms))):
        if isinstance(transform, LoadAnnotations) and dataset.CLASSES is not None:
            transforms.insert(place + 1, CheckAnnotation(len(dataset.CLASSES), dataset.ignore_index))


def _annotations_are_there(dataset: Dataset, what: str) -> None:
    """Each image's label map must exist: looked for now, lest a run end at the first one that does not."""
    for part in _plain(dataset):
        names = [info["ann"]["seg_map"] for info in getattr(part, "img_infos", ()) if "ann" in info] if getattr(part, "ann_dir", None) else []
        missing = [name for name in names if not os.path.exists(os.path.join(part.ann_dir, name))]
        if missing:
            raise DataError(f"{what}: {len(missing)} of {len(names)} label maps are missing, the first is {os.path.join(part.ann_dir, missing[0])}; put them there, or take "
                            f"their images away")


def first_sample(dataset: Dataset, what: str, *, tolerated: int = 0) -> dict[str, Any]:
    """The first image of a data set that passes its pipeline; before it, at most `tolerated` may fail. Raises DataError in the words of the first that did."""
    first: DataError | None = None
    for index in range(min(tolerated + 1, len(dataset))):
        try:
            return sample(dataset, index)
        except DataError as error:
            first = first or error
    raise DataError(f"{what}: {first}") from first


def sample(dataset: Dataset, index: int) -> dict[str, Any]:
    """One image through its pipeline. Raises DataError naming the file that is at fault, or the image and the words of whichever transform refused."""
    try:
        return dataset[index]
    except DataError:
        raise
    except Exception as error:  # transforms are anybody's code
        image, labels = _files(dataset, index)
        for file in filter(None, (image, labels)):
            if cv2.imread(file, cv2.IMREAD_UNCHANGED) is None:
                raise DataError(f"{file} {'is no picture that can be read' if os.path.exists(file) else 'is not there'}; copy it again, or take the image away") from error
        reason = " ".join(str(error).split())  # OpenCV's has several lines
        raise DataError(f"the pipeline fails on image {image}: {type(error).__name__}: {reason}; is the image, or its label map, damaged?") from error


def _files(dataset: Dataset, index: int) -> tuple[str, str | None]:
    """Image and label map of an entry, inside wrappers too."""
    if hasattr(dataset, "dataset"):  # RepeatDataset
        return _files(dataset.dataset, index % len(dataset.dataset))
    for part in getattr(dataset, "datasets", ()):
        if index < len(part):
            return _files(part, index)
        index -= len(part)
    info = dataset.img_infos[index]
    labels = os.path.join(dataset.ann_dir or "", info["ann"]["seg_map"]) if "ann" in info else None
    return os.path.join(dataset.img_dir or "", info["filename"]), labels


class Examined(Dataset):
    """(inputs, ground truth, None), or (None, None, what is wrong) of each image of an evaluation."""

    def __init__(self, dataset: Dataset, truth: bool) -> None:
        self.dataset, self.truth = dataset, truth

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, Tensor | None, str | None]:
        try:
            inputs = sample(self.dataset, index)
            if not self.truth:
                return inputs, None, None
            truth, size = ground_truth(self.dataset, index), _one_of(_one_of(inputs["img_metas"])).data["ori_shape"][:2]
        except DataError as error:
            return None, None, str(error)
        if truth.ndim < 2 and truth.size == size[0] * size[1]:
            truth = truth.reshape(size)  # mmseg's loader drops sides of one pixel
        if truth.shape != size:
            info = self.dataset.img_infos[index]
            return None, None, (f"image {info['filename']} has {size[0]} x {size[1]} pixels but its label map {info['ann']['seg_map']} has "
                                f"{' x '.join(map(str, truth.shape))}; it must have one class per pixel")
        return inputs, torch.from_numpy(truth), None


def ground_truth(dataset: Dataset, index: int) -> np.ndarray:
    """Classes (h, w) uint8 of an image, as mmseg's metrics read them: after `reduce_zero_label`, 255 stands for none. Raises DataError naming the file."""
    try:
        labels = dataset.get_gt_seg_map_by_idx(index)
    except Exception as error:  # whatever a loader of theirs or OpenCV says
        reason = " ".join(str(error).split())
        raise DataError(f"label map {dataset.img_infos[index]['ann']['seg_map']} cannot be read: {type(error).__name__}: {reason}; copy it again") from error
    if dataset.reduce_zero_label:
        labels = np.where(labels == 0, 255, labels - 1).astype(np.uint8)
        labels[labels == 254] = 255
    return labels


def _one_of(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


class PositionSeeded(Dataset):
    """A data set whose random augmentations depend on (seed, stream position) alone, and so does the image that replaces one that cannot be used."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        (position, index), faults = key, []
        for attempt in range(REPLACEMENTS):
            np.random.seed(derived_seed(self.seed, "augmentation", position))  # mmseg's transforms draw from numpy's global state
            random.seed(derived_seed(self.seed, "augmentation", position))
            try:
                return {**sample(self.dataset, index), "position": position, "faults": faults}
            except DataError as error:
                faults.append(str(error))
            index = derived_seed(self.seed, "replacement", position, attempt) % len(self.dataset)
        raise FaultError(f"{REPLACEMENTS} training images in a row cannot be used, the last one because: {faults[-1]}")


def training_batches(dataset: Dataset, sampler: GlobalBatchSampler, *, workers: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Endless micro-batches of this rank, on `device`. workers: processes that decode ahead; 0 decodes in this one."""
    loader = DataLoader(PositionSeeded(dataset, seed), batch_sampler=sampler, num_workers=workers, collate_fn=_micro_batch, worker_init_fn=_quiet_worker,
                        pin_memory=device.type == "cuda", generator=torch.Generator().manual_seed(0))
    for inputs, position, faults in _loaded(loader):
        yield Batch(_to_device(inputs, device), position, tuple(faults))


def evaluation_images(dataset: Dataset, *, rank: int, world_size: int, workers: int, device: torch.device, truth: bool = True) -> Iterator[EvaluationImage]:
    """Images rank, rank + world size, ... on `device`: ranks may get different numbers of them. truth: with the ground truth."""
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(Subset(Examined(dataset, truth), indices), batch_size=1, num_workers=workers, collate_fn=_alone, worker_init_fn=_quiet_worker,
                        pin_memory=device.type == "cuda", generator=torch.Generator().manual_seed(0))
    for index, (inputs, labels, fault) in zip(indices, _loaded(loader), strict=True):
        if inputs and isinstance(inputs["img"], Tensor):  # a pipeline without MultiScaleFlipAug
            inputs = {name: [value] for name, value in inputs.items()}
        yield EvaluationImage(index, _to_device(inputs or {}, device), _to_device(labels, device), fault)


def _loaded(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader; of an error in a worker, its own sentence without the worker's traceback."""
    try:
        yield from loader
    except DataError as error:
        raise type(error)(str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{type(error).__name__}: ")) from None


def _collate(samples: list[dict[str, Any]]) -> Any:
    """mmcv's batch without its DataContainers, whose memory torch would not pin."""
    return _unpacked(collate(samples, samples_per_gpu=len(samples)))


def _micro_batch(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], int, list[str]]:
    """(inputs, stream position of the first image, what was wrong with images that these replace)."""
    faults = [fault for sample in samples for fault in sample.pop("faults")]
    inputs = _collate(samples)
    return inputs, int(inputs.pop("position")[0]), faults


def _alone(samples: list[tuple[dict[str, Any] | None, Tensor | None, str | None]]) -> tuple[Any, Tensor | None, str | None]:
    inputs, truth, fault = samples[0]
    return inputs and _collate([inputs]), truth, fault


def _unpacked(value: Any) -> Any:
    if isinstance(value, DataContainer):
        return _unpacked(value.data[0])  # one chunk: a process drives one device
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    return value


def _quiet_worker(_: int) -> None:
    """One OpenCV thread a worker: the workers are the parallelism. A request to stop is the training process's to answer, which still wants its batch."""
    cv2.setNumThreads(0)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _to_device(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value
