"""From mmseg data sets to batches of tensors.

Training batches come from an endless, seeded stream: which images, and how each is cropped, flipped and
coloured, depends on the seed and the image's position in the stream alone (not on workers, ranks or
restarts). Evaluation batches are single images, dealt out to the ranks in turn.
"""

import ctypes
import gc
import multiprocessing
import os
import random
import resource
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.parallel import DataContainer, collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.orientation import turned_against
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.data.samples import sample
from internseg_ds.errors import DataError, FaultError, HostError
from internseg_ds.host_faults import MORE_FILES
from internseg_ds.seeding import derived_seed
from internseg_ds.torch_internals import tree_leaves

NOT_FOR_WORKERS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
"""Signals that terminals, launchers and schedulers send to whole groups of processes, and that are a training
process's to answer."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
FILES_FOR_A_TENSOR = 2
"""That a worker holds open until its process has taken the tensor over."""
FILES_TO_SPARE = 16
REPLACEMENTS = 20
"""Images that are tried for one place of the stream, before all of them are taken for damaged."""


@dataclass(frozen=True)
class EvaluationImage:
    """One image of an evaluation. fault: why it could not be read, naming it; the rest is empty then."""

    index: int
    inputs: dict[str, Any]
    """What the segmentor's forward(return_loss=False) takes: img, a list over test-time augmentations of (1,
    3, h, w) float32, and img_metas, a list over augmentations of lists of one dict."""
    truth: Tensor | None = None
    """Class of each pixel of the original image, `ignore_index` of the data set for none: (h, w) uint8, or
    int32 where there are more classes."""
    fault: str | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch of training images, and where it stands in the stream."""

    inputs: dict[str, Any]
    """What the segmentor's forward takes: img (b, 3, h, w) float32, gt_semantic_seg (b, 1, h, w) int64 with
    255 for "ignore", img_metas."""
    position: int
    """Stream position of its first image."""
    faults: tuple[str, ...] = ()
    """What was wrong with images that stood here in the stream, and were replaced by others."""

    @property
    def files(self) -> list[str]:
        return [meta["filename"] for meta in self.inputs["img_metas"]]


class Examined(Dataset):
    """(inputs, ground truth, None), or (None, None, what is wrong) of each image of an evaluation."""

    def __init__(self, dataset: SegmentationDataset, truth: bool) -> None:
        self.dataset, self.truth = dataset, truth

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[dict[str, Any] | None, Tensor | None, str | None]:
        try:
            inputs = sample(self.dataset, index)
            if not self.truth:
                return inputs, None, None
            truth, meta = ground_truth(self.dataset, index), _one_of(_one_of(inputs["img_metas"])).data
        except DataError as error:
            return None, None, str(error)
        size = meta["ori_shape"][:2]
        if truth.ndim < 2 and truth.size == size[0] * size[1]:
            truth = truth.reshape(size)  # a loader like mmseg's drops sides of one pixel
        if truth.shape != size:
            info = self.dataset.img_infos[index]
            return (
                None,
                None,
                (
                    f"image {info['filename']} has {size[0]} x {size[1]} pixels but its label map "
                    f"{info['ann']['seg_map']} has "
                    f"{' x '.join(map(str, truth.shape))}; it must have one class per "
                    f"pixel{turned_against(meta['filename'], truth.shape, size)}"
                ),
            )
        return inputs, torch.from_numpy(truth), None


def _one_of(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


class PositionSeeded(Dataset):
    """A data set whose random augmentations depend on (seed, stream position) alone, and so does the image
    that replaces one that cannot be used."""

    def __init__(self, dataset: SegmentationDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        faults: list[str] = []
        for attempt in range(REPLACEMENTS):
            drawn = derived_seed(self.seed, "augmentation", position)
            np.random.seed(drawn)  # mmseg's transforms draw from numpy's global state
            random.seed(drawn)
            torch.default_generator.manual_seed(drawn)  # the CPU's alone
            try:
                return {**sample(self.dataset, index), "position": position, "faults": faults}
            except DataError as error:
                faults.append(str(error))
            index = derived_seed(self.seed, "replacement", position, attempt) % len(self.dataset)
        raise FaultError(
            f"{REPLACEMENTS} training images in a row cannot be used, the last one because: {faults[-1]}"
        )


def training_batches(
    dataset: SegmentationDataset,
    sampler: GlobalBatchSampler,
    *,
    workers: int,
    seed: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """Endless micro-batches of this rank, on `device`. workers: processes that decode ahead; 0 decodes in
    this one."""
    loader = DataLoader(
        PositionSeeded(dataset, seed),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_micro_batch,
        worker_init_fn=quiet_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    for inputs, position, faults in loaded(loader):
        yield Batch(_to_device(inputs, device), position, tuple(faults))


def evaluation_images(
    dataset: SegmentationDataset,
    *,
    rank: int,
    world_size: int,
    workers: int,
    device: torch.device,
    truth: bool = True,
) -> Iterator[EvaluationImage]:
    """Images rank, rank + world size, ... on `device`: ranks may get different numbers of them. truth: with
    the ground truth."""
    indices = range(rank, len(dataset), world_size)
    loader = DataLoader(
        Subset(Examined(dataset, truth), indices),
        batch_size=1,
        num_workers=workers,
        collate_fn=_alone,
        worker_init_fn=quiet_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),
    )
    for index, (inputs, labels, fault) in zip(indices, loaded(loader), strict=True):
        if inputs and isinstance(inputs["img"], Tensor):  # a pipeline without MultiScaleFlipAug
            inputs = {name: [value] for name, value in inputs.items()}
        yield EvaluationImage(index, _to_device(inputs or {}, device), _to_device(labels, device), fault)


def loaded(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader; of an error in a worker, its own message without the worker's traceback."""
    # workers take that over, and so none is hit before `quiet_worker`
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    try:
        yield from batches
    except (DataError, HostError) as error:
        raise type(error)(
            str(error)
            .strip()
            .splitlines()[-1]
            .removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        ) from None


def _collate(samples: list[dict[str, Any]]) -> Any:
    """mmcv's batch without its DataContainers, whose memory torch would not pin."""
    return _unpacked(collate(samples, samples_per_gpu=len(samples)))


def _micro_batch(samples: list[dict[str, Any]]) -> tuple[dict[str, Any], int, list[str]]:
    """(inputs, stream position of the first image, what was wrong with images that these replace)."""
    faults = [fault for sample in samples for fault in sample.pop("faults")]
    inputs = _collate(samples)
    _check_open_files(inputs)
    return inputs, int(inputs.pop("position")[0]), faults


def _alone(
    samples: list[tuple[dict[str, Any] | None, Tensor | None, str | None]],
) -> tuple[Any, Tensor | None, str | None]:
    inputs, truth, fault = samples[0]
    batch = inputs and _collate([inputs]), truth, fault
    _check_open_files(batch)
    return batch


def _check_open_files(batch: Any) -> None:
    """Raises HostError in a worker that has no files left to hand its batch over through: that happens in
    threads of Python's own, which only print what goes wrong there, some without end, while the training
    waits for the batch."""
    if get_worker_info() is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    tensors = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(batch))
    if len(os.listdir("/proc/self/fd")) + FILES_FOR_A_TENSOR * tensors + FILES_TO_SPARE > limit:
        raise HostError(
            f"host {socket.gethostname()} allows a process {limit} open files, too few for a data worker "
            f"to hand over {tensors} tensors a batch; {MORE_FILES}"
        )


def _unpacked(value: Any) -> Any:
    if isinstance(value, DataContainer):
        return _unpacked(value.data[0])  # one chunk: a process drives one device
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    return value


def quiet_worker(_: int) -> None:
    """One OpenCV thread a worker: the workers are the parallelism.

    Launchers and schedulers signal workers too, but a request to stop is the training process's to answer,
    and it still wants its batch. So a worker ends by SIGTERM only when that process sent it.
    """
    _end_with_the_parent()
    gc.enable()  # the training process collects at its steps, which a worker has none of
    cv2.setNumThreads(0)
    signal.set_wakeup_fd(-1)  # it is the training process's
    for number in NOT_FOR_WORKERS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says_so, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent() -> None:
    """Has the kernel kill this worker when the thread that started it ends, whatever the worker is at then:
    an image that hangs, or a wait for memory."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if multiprocessing.get_start_method() == "fork" and parent is not None and os.getppid() != parent.pid:
        os._exit(0)  # it has ended before


def _end_when_the_parent_says_so(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _to_device(value: Any, device: torch.device) -> Any:
    """`value` with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value
