"""From images to labels: sliding windows in batches, logits added up in fp32, resized and compared some classes at a time.

In: images with their test-time augmentations, as `evaluation_images` yields them. Out: labels at the size of the original image, those of mmseg's
`simple_test` and `aug_test`. Windows of one size share a forward, whichever image or augmentation they are from. Beside the model, the device holds the
logits (classes, h, w) of the augmentations that are under way, once, and CHUNK_BYTES for resizing; where there are several augmentations, also the sum of
their probabilities.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.distributed.gathering import Forwards

log = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows per forward, where `model.test_cfg.batch_size` does not say."""
CHUNK_BYTES = 2**28
"""Of logits at the original image's size that are held at a time."""


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of an image."""

    top: int
    bottom: int
    left: int
    right: int


def windows(height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Windows of `crop` pixels (or the image's size where that is less) every `stride` pixels, row by row; those at the far edges are moved inside.

    The same places, in the same order, as mmseg's `EncoderDecoder.slide_inference`.
    """
    rows, columns = ([(max(min(at * step + size, side) - size, 0), min(at * step + size, side)) for at in range(max(side - size + step - 1, 0) // step + 1)]
                     for side, size, step in zip((height, width), crop, stride, strict=True))
    return [Window(*row, *column) for row in rows for column in columns]


@dataclass(eq=False)
class View:
    """One augmentation of an image: pixels (3, h, w), mmseg's meta, and the logits (classes, h, w) fp32 as its windows come in."""

    pixels: Tensor
    meta: Mapping[str, Any]
    windows: list[Window]
    logits: Tensor | None = None
    counts: Tensor | None = None
    """Windows over each pixel (h, w); None where one window covers all."""
    done: int = 0

    def add(self, window: Window, logits: Tensor) -> None:
        """logits: (classes, h, w) of one window, in the order of `windows`."""
        self.done += 1
        if len(self.windows) == 1:
            self.logits = logits.float()
            return
        if self.logits is None:
            size = self.pixels.shape[1:]
            self.logits, self.counts = logits.new_zeros(len(logits), *size, dtype=torch.float32), logits.new_zeros(size, dtype=torch.float32)
        rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
        self.logits[:, rows, columns] += logits
        self.counts[rows, columns] += 1
        if self.complete:
            self.logits /= self.counts

    @property
    def complete(self) -> bool:
        return self.done == len(self.windows)

    def resized(self, align_corners: bool) -> Iterator[tuple[int, Tensor]]:
        """(number of the first class, logits (some classes, h, w)) at the original image's size: padding cut off, and flipped back."""
        height, width = self.meta["ori_shape"][:2]
        inner = self.logits[None, :, : self.meta["img_shape"][0], : self.meta["img_shape"][1]]
        some = max(1, CHUNK_BYTES // (4 * height * width))
        for first in range(0, inner.size(1), some):
            chunk = F.interpolate(inner[:, first : first + some], size=(height, width), mode="bilinear", align_corners=align_corners)[0]
            if self.meta.get("flip"):
                chunk = chunk.flip(2 if self.meta["flip_direction"] == "horizontal" else 1)
            yield first, chunk


@dataclass(eq=False)
class Pending:
    """An image whose windows are not all through yet."""

    key: Any
    views: list[View] = field(default_factory=list)


class Segmenter:
    """A segmentor over a stream of images. Settings are those of `model.test_cfg`: mode, crop_size, stride, and batch_size (windows per forward).

    Windows whose sides are no whole patches of the backbone (images smaller than the crop, whole images of any size) are padded with zeros for the forward.
    """

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards
        segmentor = forwards.segmentor
        self.test_cfg, self.align_corners, self.head = segmentor.test_cfg, segmentor.align_corners, segmentor.decode_head
        self.patch = getattr(segmentor.backbone, "patch_size", 1)
        self.batch_size = self.test_cfg.get("batch_size", BATCH_SIZE)

    @torch.no_grad()
    def labels(self, images: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[tuple[Any, Tensor]]:
        """(key, class labels (h, w) int64) for each (key, inputs), on the device; in the order in which images are finished.

        inputs: img, a list over augmentations of (1, 3, h, w), and img_metas, a list over augmentations of lists of one dict.
        """
        for pending in self._through(images):
            yield pending.key, self._labels(pending.views)

    @torch.no_grad()
    def labels_and_logits(self, images: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """The same with logits (classes, h, w) fp32 on the CPU; of several augmentations, the logarithm of the mean probability."""
        for pending in self._through(images):
            if len(pending.views) == 1:
                logits = torch.cat([chunk.cpu() for _, chunk in pending.views[0].resized(self.align_corners)])
            else:
                logits = self._probabilities(pending.views).log().cpu()
            yield pending.key, self._labels(pending.views), logits

    def _through(self, images: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[Pending]:
        """The images with all their logits. Ends with what ranks owe each other."""
        queues: dict[tuple[int, int], deque[tuple[Pending, View, Window]]] = defaultdict(deque)
        waiting: list[Pending] = []  # oldest first; images of rare sizes must not wait until the end, for they take memory
        for key, inputs in images:
            pending = Pending(key)
            waiting.append(pending)
            for pixels, metas in zip(inputs["img"], inputs["img_metas"], strict=True):
                view = View(pixels[0], metas[0], self._windows(*pixels.shape[2:]))
                pending.views.append(view)
                for window in view.windows:
                    queues[window.bottom - window.top, window.right - window.left].append((pending, view, window))
            for queue in queues.values():
                while len(queue) >= self.batch_size:
                    yield from self._run(queue, waiting)
            while len(waiting) > 2 * self.batch_size:
                yield from self._run(next(queue for queue in queues.values() if any(item[0] is waiting[0] for item in queue)), waiting)
        for queue in queues.values():
            while queue:
                yield from self._run(queue, waiting)
        self.forwards.finish()

    def _windows(self, height: int, width: int) -> list[Window]:
        if self.test_cfg.mode == "whole":
            return [Window(0, height, 0, width)]
        return windows(height, width, self.test_cfg.crop_size, self.test_cfg.stride)

    def _run(self, queue: deque[tuple[Pending, View, Window]], waiting: list[Pending]) -> list[Pending]:
        """One forward for the first windows of a queue; returns the images that it completed."""
        batch = [queue.popleft() for _ in range(min(self.batch_size, len(queue)))]
        logits = self._forward(torch.stack([view.pixels[:, window.top : window.bottom, window.left : window.right] for _, view, window in batch]),
                               [view.meta for _, view, _ in batch])
        for (_, view, window), part in zip(batch, logits, strict=True):
            view.add(window, part)
        finished = [pending for pending in waiting if all(view.complete for view in pending.views)]
        for pending in finished:
            waiting.remove(pending)
        return finished

    def _forward(self, pixels: Tensor, metas: list[Mapping[str, Any]]) -> Tensor:
        """(b, 3, h, w) -> logits (b, classes, h, w). Where the device's memory does not suffice, in smaller batches from here on."""
        height, width = pixels.shape[2:]
        try:
            return self.forwards(F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch)), metas)[:, :, :height, :width]
        except torch.OutOfMemoryError:
            if len(pixels) == 1 or self.forwards.in_step:
                raise
            self.batch_size = min(self.batch_size, len(pixels) // 2)
            log.warning("%d windows at once do not fit into the device's memory; going on with %d (model.test_cfg.batch_size)", len(pixels), self.batch_size)
        torch.cuda.empty_cache()
        size = self.batch_size
        return torch.cat([self._forward(pixels[first : first + size], metas[first : first + size]) for first in range(0, len(pixels), size)])

    def _labels(self, views: list[View]) -> Tensor:
        if self.head.out_channels == 1:
            sigmoids = sum(torch.cat([chunk for _, chunk in view.resized(self.align_corners)]).sigmoid() for view in views) / len(views)
            return (sigmoids[0] > self.head.threshold).long()
        if len(views) > 1:
            return self._probabilities(views).argmax(dim=0)
        (view,) = views
        best: Tensor | None = None
        for first, chunk in view.resized(self.align_corners):  # of the largest softmax, which is the largest logit
            value, index = chunk.max(dim=0)
            if best is None:
                best, labels = value, index
            else:
                labels = torch.where(value > best, index + first, labels)
                best = torch.maximum(best, value)
        return labels

    def _probabilities(self, views: list[View]) -> Tensor:
        """The mean of the views' softmax (classes, h, w) at the original image's size."""
        total = views[0].logits.new_zeros(len(views[0].logits), *views[0].meta["ori_shape"][:2])
        for view in views:
            chunks = view.resized(self.align_corners)
            first, chunk = next(chunks)
            if len(chunk) == len(total):
                total += chunk.softmax(dim=0)
                continue
            norm = chunk.logsumexp(dim=0)  # over all classes, some at a time
            for _, chunk in chunks:
                norm = torch.logaddexp(norm, chunk.logsumexp(dim=0))
            for first, chunk in view.resized(self.align_corners):
                total[first : first + len(chunk)] += (chunk - norm).exp_()
        return total.div_(len(views))
