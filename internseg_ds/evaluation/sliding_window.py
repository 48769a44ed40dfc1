"""From images to labels: sliding windows in batches, logits added up in fp32, resized and compared some
classes at a time.

In: images with their test-time augmentations, as `evaluation_images` yields them. Out: labels at the size of
the original image, those of mmseg's `simple_test` and `aug_test`. Consecutive windows of one size share a
forward, whichever image or augmentation they are from. Beside the model and one forward, the device holds the
logits (classes, h, w) of the augmentation under way and a few times CHUNK_BYTES for resizing; where there are
several augmentations, also the sum of their probabilities. Letters: b windows of a forward, (h, w) a size in
pixels.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from internseg_ds.distributed.gathering import CHUNK_BYTES, WINDOWS_PER_FORWARD, Forwards
from internseg_ds.models.backbone import patch_size

log = logging.getLogger(__name__)
Key = TypeVar("Key")


class Window(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of an image."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


def windows(height: int, width: int, crop: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Windows of `crop` (height, width) pixels every `stride` (vertical, horizontal) pixels, row by row.

    The last ones are moved inside the image; an image smaller than the crop is one window. The same windows,
    in the same order, as mmseg's `EncoderDecoder.slide_inference`.
    """
    rows = spans(height, crop[0], stride[0])
    columns = spans(width, crop[1], stride[1])
    return [Window(*row, *column) for row in rows for column in columns]


def spans(side: int, size: int, step: int) -> list[tuple[int, int]]:
    """Begin and end of each window of `size` pixels, every `step` pixels, along one side of the image."""
    count = max(side - size + step - 1, 0) // step + 1
    ends = [min(number * step + size, side) for number in range(count)]
    return [(max(end - size, 0), end) for end in ends]


FLIPPED = {"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}
"""The dimensions of (classes, h, w) that mmcv's `imflip` reverses."""


@dataclass(eq=False)
class View:
    """One augmentation of an image, and its logits as the windows are computed."""

    pixels: Tensor
    """(3, h, w) float32."""
    meta: Mapping[str, Any]
    """mmseg's img_meta."""
    windows: list[Window]
    logits: Tensor | None = None
    """(classes, h, w) float32: the sum over windows, and their mean once the view is complete."""
    counts: Tensor | None = None
    """(h, w) float32: number of windows over each pixel; None where one window covers all."""
    done: int = 0
    """Number of windows whose logits were added."""

    def add(self, window: Window, logits: Tensor) -> None:
        """Add the logits (classes, h, w) of the next of `windows`, any float dtype."""
        self.done += 1
        if len(self.windows) == 1:
            self.logits = logits.float()
            return
        if self.logits is None or self.counts is None:
            size = self.pixels.shape[1:]
            self.logits = logits.new_zeros(len(logits), *size, dtype=torch.float32)
            self.counts = logits.new_zeros(size, dtype=torch.float32)
        rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
        self.logits[:, rows, columns] += logits
        self.counts[rows, columns] += 1
        if self.complete:
            self.logits /= self.counts

    @property
    def complete(self) -> bool:
        return self.done == len(self.windows)

    def take_logits(self) -> Tensor:
        """The logits (classes, h, w) float32 of a complete view, which lets go of them."""
        if self.logits is None or not self.complete:
            raise RuntimeError(f"{self.done} of {len(self.windows)} windows of this view are computed")
        logits = self.logits
        self.logits = None
        return logits


def at_original_size(
    logits: Tensor, meta: Mapping[str, Any], align_corners: bool
) -> Iterator[tuple[int, Tensor]]:
    """Resize a view's logits to the original image: without padding, and flipped back where the view is
    flipped.

    logits: (classes, h, w) float32. Yields (number of the first class, logits (some classes, h, w)),
    CHUNK_BYTES at a time: all classes at the size of a large image may not fit.
    """
    height, width = meta["ori_shape"][:2]
    unpadded = logits[None, :, : meta["img_shape"][0], : meta["img_shape"][1]]
    some = max(1, CHUNK_BYTES // (4 * height * width))  # classes; 4 bytes per fp32
    for first in range(0, unpadded.size(1), some):
        chunk = F.interpolate(
            unpadded[:, first : first + some],
            size=(height, width),
            mode="bilinear",
            align_corners=align_corners,
        )[0]
        if meta.get("flip"):
            chunk = chunk.flip(FLIPPED[meta["flip_direction"]])
        yield first, chunk


@dataclass(eq=False)
class PendingImage:
    """An image whose windows are not all computed yet."""

    key: Any
    views: int
    """Number of its augmentations."""
    total: Tensor | None = None
    """Of several views, the sum of the probabilities (classes, h, w) float32 so far, at the original image's
    size."""
    done: int = 0
    """Number of complete views."""


@dataclass(frozen=True)
class ImagePrediction:
    """The result for one image."""

    key: Any
    labels: Tensor
    """(h, w) int64, on the device."""
    logits: Tensor | None
    """(classes, h, w) float32 on the CPU, where asked for; of several augmentations, the logarithm of
    their mean probability."""
    scores: Tensor | None = None
    """(h, w) float32 on the device, where asked for: the probability of the label of each pixel, by the softmax of
    the logits (of one output, their sigmoid)."""


class SlidingWindowInference:
    """Runs a segmentor over a stream of images. Settings are those of `model.test_cfg`: mode, crop_size,
    stride, and batch_size (windows per forward).

    Windows whose sides are no multiples of the backbone's patch size (images smaller than the crop, whole
    images of any size) are padded with zeros for the forward.
    """

    def __init__(self, forwards: Forwards, *, logits: bool = False, scores: bool = False) -> None:
        """logits, scores: whether results have them too."""
        self.forwards = forwards
        self.with_logits = logits
        self.with_scores = scores
        segmentor: EncoderDecoder = forwards.segmentor
        head = segmentor.decode_head
        self.test_cfg = segmentor.test_cfg
        self.align_corners: bool = segmentor.align_corners
        self.outputs: int = segmentor.out_channels
        self.binary = self.outputs == 1
        last_head = head[-1] if isinstance(head, nn.ModuleList) else head  # of a cascade
        self.threshold: Any = getattr(last_head, "threshold", None)  # of a binary head; mmseg's all have one
        self.patch = patch_size(segmentor.backbone)
        default = 1 if forwards.in_step else WINDOWS_PER_FORWARD
        self.batch_size: int = self.test_cfg.get("batch_size", default)
        self._passes = 0
        self._not_finite: Tensor | int = 0
        """Forward passes with a logit that is NaN or infinite; on the device, read at the end."""

    @torch.no_grad()
    def predict(self, images: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[ImagePrediction]:
        """Predict the labels of each (key, inputs), and yield the results in their order. Collective at the end
        where the forwards are.

        inputs: img, a list over augmentations of (1, 3, h, w) float32, and img_metas, a list over
        augmentations of lists of one dict.
        """
        for (image, view, window), logits in self.window_logits(self._windows_of(images)):
            view.add(window, logits)
            if view.complete:
                prediction = self._finish_view(image, view)
                if prediction is not None:
                    yield prediction
        self.finish()

    def window_logits(
        self, pieces: Iterable[tuple[Key, Tensor, Mapping[str, Any]]]
    ) -> Iterator[tuple[Key, Tensor]]:
        """The logits of windows, in their order. Collective where the forwards are; `finish` belongs behind the last.

        pieces: of each window a key, pixels (3, h, w) float32, and the img_meta of its image. Yields the key with
        the logits (classes, h, w) of any float dtype.
        """
        batch: list[tuple[Key, Tensor, Mapping[str, Any]]] = []
        for piece in pieces:
            if batch and (len(batch) >= self.batch_size or batch[0][1].shape != piece[1].shape):
                yield from self._run(batch)
                batch = []
            batch.append(piece)
        if batch:
            yield from self._run(batch)

    def best(self, logits: Tensor) -> Tensor:
        """logits: (classes, h, w) float32 of an image that is not resized -> its labels, (h, w) int64, as `predict`
        has them."""
        if self.binary:
            return (logits[0].sigmoid() > self.threshold).long()
        return logits.max(dim=0).indices

    def finish(self) -> None:
        """Takes part in the other ranks' passes until all are done, and warns of logits that were not finite since the
        last time. Collective where the forwards are."""
        self.forwards.finish()
        if bad := int(self._not_finite):
            log.warning(
                "%d of %d forward passes of this rank gave logits that are NaN or infinite: the labels of these "
                "images mean nothing; look at the weights, and try engine.backbone_dtype='float32'",
                bad,
                self._passes,
            )
        self._passes = self._not_finite = 0

    def _windows_of(
        self, images: Iterable[tuple[Any, Mapping[str, Any]]]
    ) -> Iterator[tuple[tuple[PendingImage, View, Window], Tensor, Mapping[str, Any]]]:
        for key, inputs in images:
            image = PendingImage(key, len(inputs["img"]))
            for pixels, metas in zip(inputs["img"], inputs["img_metas"], strict=True):
                view = View(pixels[0], metas[0], self._windows(*pixels.shape[2:]))
                for window in view.windows:
                    rows, columns = slice(window.top, window.bottom), slice(window.left, window.right)
                    yield (image, view, window), view.pixels[:, rows, columns], view.meta

    def _windows(self, height: int, width: int) -> list[Window]:
        if self.test_cfg.mode == "whole":
            return [Window(0, height, 0, width)]
        return windows(height, width, self.test_cfg.crop_size, self.test_cfg.stride)

    def _run(self, batch: list[tuple[Key, Tensor, Mapping[str, Any]]]) -> Iterator[tuple[Key, Tensor]]:
        """Run one forward for all windows of a batch."""
        logits = self._forward(torch.stack([pixels for _, pixels, _ in batch]), [meta for *_, meta in batch])
        self._passes += 1
        self._not_finite = self._not_finite + (~torch.isfinite(logits).all()).int()
        for (key, _, _), part in zip(batch, logits, strict=True):
            yield key, part

    def _forward(self, pixels: Tensor, metas: list[Mapping[str, Any]]) -> Tensor:
        """pixels: (b, 3, h, w) float32 -> logits (b, classes, h, w). Where the device's memory does not
        suffice, in smaller batches from here on."""
        height, width = pixels.shape[2:]
        try:
            return self.forwards(F.pad(pixels, (0, -width % self.patch, 0, -height % self.patch)), metas)[
                :, :, :height, :width
            ]
        except torch.OutOfMemoryError:
            # collective forwards must stay as many as on the other ranks
            if len(pixels) == 1 or self.forwards.in_step:
                raise
            self.batch_size = min(self.batch_size, len(pixels) // 2)
            log.warning(
                "%d windows at once do not fit into the device's memory; going on with %d "
                "(model.test_cfg.batch_size)",
                len(pixels),
                self.batch_size,
            )
        # outside of the except block, where the exception would keep the failed forward's tensors alive
        torch.cuda.empty_cache()
        size = self.batch_size
        return torch.cat(
            [
                self._forward(pixels[first : first + size], metas[first : first + size])
                for first in range(0, len(pixels), size)
            ]
        )

    def _finish_view(self, image: PendingImage, view: View) -> ImagePrediction | None:
        """Add a complete view to its image; the result when it was the image's last. Views of an image become
        complete in their order."""
        image.done += 1
        logits = view.take_logits()
        if image.views == 1 and not self.binary:
            labels, scores = self._labels(logits, view.meta)
            if not self.with_logits:
                return ImagePrediction(image.key, labels, None, scores)
            chunks = at_original_size(logits, view.meta, self.align_corners)
            whole = torch.cat([chunk.cpu() for _, chunk in chunks])
            return ImagePrediction(image.key, labels, whole, scores)
        if image.total is None:
            image.total = logits.new_zeros(len(logits), *view.meta["ori_shape"][:2])
        self._add_probabilities(image.total, logits, view.meta)
        if image.done < image.views:
            return None
        mean = image.total.div_(image.views)
        labels = (mean[0] > self.threshold).long() if self.binary else mean.argmax(dim=0)
        scores = None
        if self.with_scores:
            scores = torch.where(labels > 0, mean[0], 1 - mean[0]) if self.binary else mean.amax(dim=0)
        if not self.with_logits:
            return ImagePrediction(image.key, labels, None, scores)
        return ImagePrediction(image.key, labels, (mean.logit() if self.binary else mean.log()).cpu(), scores)

    def _labels(self, logits: Tensor, meta: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """logits: (classes, h, w) of a view -> the class of the largest logit, which is also that of the
        largest softmax, of each pixel of the original image: (h, w) int64; and where asked for that softmax,
        (h, w) float32."""
        chunks = at_original_size(logits, meta, self.align_corners)
        _, chunk = next(chunks)
        best, labels = chunk.max(dim=0)
        norm = chunk.logsumexp(dim=0) if self.with_scores else None
        for first, chunk in chunks:
            value, index = chunk.max(dim=0)
            labels = torch.where(value > best, index + first, labels)
            best = torch.maximum(best, value)
            norm = None if norm is None else torch.logaddexp(norm, chunk.logsumexp(dim=0))
        return labels, None if norm is None else (best - norm).exp_()

    def _add_probabilities(self, total: Tensor, logits: Tensor, meta: Mapping[str, Any]) -> None:
        """Add a view's softmax (of one channel: its sigmoid) to `total` (classes, h, w) float32, at the
        original image's size. logits: (classes, h, w) of the view."""
        chunks = at_original_size(logits, meta, self.align_corners)
        _, chunk = next(chunks)
        if len(chunk) == len(total):
            total += chunk.sigmoid() if self.binary else chunk.softmax(dim=0)
            return
        # the softmax's denominator is over all classes, of which there are some at a time: two passes
        norm = chunk.logsumexp(dim=0)
        for _, chunk in chunks:
            norm = torch.logaddexp(norm, chunk.logsumexp(dim=0))
        for first, chunk in at_original_size(logits, meta, self.align_corners):
            total[first : first + len(chunk)] += (chunk - norm).exp_()
