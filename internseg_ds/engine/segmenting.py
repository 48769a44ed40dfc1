"""From images to labels: sliding windows in batches, logits added up in fp32, resized and compared some classes at a time.

In: images with their test-time augmentations, as `evaluation_images` yields them. Out: labels at the size of the original image, those of mmseg's
`simple_test` and `aug_test`. Windows that follow each other share a forward when they have one size, whichever image or augmentation they are from. Beside
the model and one forward, the device holds the logits (classes, h, w) of the augmentation under way and a few times CHUNK_BYTES for resizing; where there
are several augmentations, also the sum of their probabilities.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internseg_ds.distributed.gathering import Forwards
from internseg_ds.models.backbone import patch_size

log = logging.getLogger(__name__)

BATCH_SIZE = 8
"""Windows per forward, where `model.test_cfg.batch_size` does not say. One where ranks run in step, which they do for want of memory."""
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
    rows, columns = (
        [
            (max(min(at * step + size, side) - size, 0), min(at * step + size, side))
            for at in range(max(side - size + step - 1, 0) // step + 1)
        ]
        for side, size, step in zip((height, width), crop, stride, strict=True)
    )
    return [Window(*row, *column) for row in rows for column in columns]


FLIPPED = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}
"""The dimensions of (classes, h, w) that mmcv's `imflip` turns around."""


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
            self.logits, self.counts = (
                logits.new_zeros(len(logits), *size, dtype=torch.float32),
                logits.new_zeros(size, dtype=torch.float32),
            )
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
            chunk = F.interpolate(
                inner[:, first : first + some],
                size=(height, width),
                mode="bilinear",
                align_corners=align_corners,
            )[0]
            if self.meta.get("flip"):
                chunk = chunk.flip(FLIPPED[self.meta["flip_direction"]])
            yield first, chunk


@dataclass(eq=False)
class Pending:
    """An image whose windows are not all through yet."""

    key: Any
    views: int
    total: Tensor | None = None
    """Of several views, the sum of the probabilities (classes, h, w) so far, at the original image's size."""
    done: int = 0


@dataclass(frozen=True)
class Segmented:
    """What came out of one image. labels: (h, w) int64. logits: (classes, h, w) fp32 on the CPU where asked for; of several augmentations, those of the
    mean probability."""

    key: Any
    labels: Tensor
    logits: Tensor | None


class Segmenter:
    """A segmentor over a stream of images. Settings are those of `model.test_cfg`: mode, crop_size, stride, and batch_size (windows per forward).

    Windows whose sides are no whole patches of the backbone (images smaller than the crop, whole images of any size) are padded with zeros for the forward.
    """

    def __init__(self, forwards: Forwards, *, logits: bool = False) -> None:
        """logits: whether to give those out too."""
        self.forwards, self.with_logits = forwards, logits
        segmentor = forwards.segmentor
        head = segmentor.decode_head
        self.test_cfg, self.align_corners, self.binary = (
            segmentor.test_cfg,
            segmentor.align_corners,
            segmentor.out_channels == 1,
        )
        self.threshold = getattr(
            head[-1] if isinstance(head, nn.ModuleList) else head, "threshold", None
        )  # of a binary head, which all have
        self.patch = patch_size(segmentor.backbone)
        self.batch_size = self.test_cfg.get("batch_size", 1 if forwards.in_step else BATCH_SIZE)

    @torch.no_grad()
    def segment(self, images: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[Segmented]:
        """Segments each (key, inputs), in their order. Ends with what ranks owe each other.

        inputs: img, a list over augmentations of (1, 3, h, w), and img_metas, a list over augmentations of lists of one dict.
        """
        batch: list[tuple[Pending, View, Window]] = []
        for key, inputs in images:
            pending = Pending(key, len(inputs["img"]))
            for pixels, metas in zip(inputs["img"], inputs["img_metas"], strict=True):
                view = View(pixels[0], metas[0], self._windows(*pixels.shape[2:]))
                for window in view.windows:
                    if batch and (len(batch) >= self.batch_size or _size(batch[0][2]) != _size(window)):
                        yield from self._run(batch)
                        batch = []
                    batch.append((pending, view, window))
        if batch:
            yield from self._run(batch)
        self.forwards.finish()

    def _windows(self, height: int, width: int) -> list[Window]:
        if self.test_cfg.mode == "whole":
            return [Window(0, height, 0, width)]
        return windows(height, width, self.test_cfg.crop_size, self.test_cfg.stride)

    def _run(self, batch: list[tuple[Pending, View, Window]]) -> Iterator[Segmented]:
        """A forward for all windows of a batch, and the images that it completes."""
        logits = self._forward(
            torch.stack(
                [
                    view.pixels[:, window.top : window.bottom, window.left : window.right]
                    for _, view, window in batch
                ]
            ),
            [view.meta for _, view, _ in batch],
        )
        for (pending, view, window), part in zip(batch, logits, strict=True):
            view.add(window, part)
            if view.complete:
                segmented = self._fold(pending, view)
                view.logits = None
                if segmented:
                    yield segmented

    def _forward(self, pixels: Tensor, metas: list[Mapping[str, Any]]) -> Tensor:
        """(b, 3, h, w) -> logits (b, classes, h, w). Where the device's memory does not suffice, in smaller batches from here on."""
        height, width = pixels.shape[2:]
        try:
            return self.forwards(F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch)), metas)[
                :, :, :height, :width
            ]
        except torch.OutOfMemoryError:
            if len(pixels) == 1 or self.forwards.in_step:
                raise
            self.batch_size = min(self.batch_size, len(pixels) // 2)
            log.warning(
                "%d windows at once do not fit into the device's memory; going on with %d (model.test_cfg.batch_size)",
                len(pixels),
                self.batch_size,
            )
        torch.cuda.empty_cache()
        size = self.batch_size
        return torch.cat(
            [
                self._forward(pixels[first : first + size], metas[first : first + size])
                for first in range(0, len(pixels), size)
            ]
        )

    def _fold(self, pending: Pending, view: View) -> Segmented | None:
        """Takes what a complete view says of its image. Views come in their order; the last one completes the image."""
        pending.done += 1
        logits = None
        if pending.views == 1 and not self.binary:
            labels = self._largest(view)
            if self.with_logits:
                logits = torch.cat([chunk.cpu() for _, chunk in view.resized(self.align_corners)])
        else:
            self._add_probabilities(pending, view)
            if pending.done < pending.views:
                return None
            mean = pending.total.div_(pending.views)
            labels = (mean[0] > self.threshold).long() if self.binary else mean.argmax(dim=0)
            if self.with_logits:
                logits = (mean.logit() if self.binary else mean.log()).cpu()
        return Segmented(pending.key, labels, logits)

    def _largest(self, view: View) -> Tensor:
        """Of each pixel, the class with the largest softmax, which is the one with the largest logit."""
        best: Tensor | None = None
        for first, chunk in view.resized(self.align_corners):
            value, index = chunk.max(dim=0)
            if best is None:
                best, labels = value, index
            else:
                labels = torch.where(value > best, index + first, labels)
                best = torch.maximum(best, value)
        return labels

    def _add_probabilities(self, pending: Pending, view: View) -> None:
        """Adds the view's softmax (one channel: its sigmoid) at the original image's size."""
        if pending.total is None:
            pending.total = view.logits.new_zeros(len(view.logits), *view.meta["ori_shape"][:2])
        total, chunks = pending.total, view.resized(self.align_corners)
        _, chunk = next(chunks)
        if len(chunk) == len(total):
            total += chunk.sigmoid() if self.binary else chunk.softmax(dim=0)
            return
        norm = chunk.logsumexp(dim=0)  # over all classes, some at a time
        for _, chunk in chunks:
            norm = torch.logaddexp(norm, chunk.logsumexp(dim=0))
        for first, chunk in view.resized(self.align_corners):
            total[first : first + len(chunk)] += (chunk - norm).exp_()


def _size(window: Window) -> tuple[int, int]:
    return window.bottom - window.top, window.right - window.left
