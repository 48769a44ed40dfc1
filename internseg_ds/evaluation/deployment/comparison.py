"""Holding a written file against the segmentor that it was made from.

Letters: b images, (h, w) their size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from internseg_ds.evaluation.deployment.graph import Input

TOLERANCE = 1e-4
"""Largest difference of a logit, as a part of the largest logit."""
GRAIN = 8
"""Pixels from one random colour to the next: images with areas and edges, not noise alone."""


def sizes_to_check(given: Input) -> list[tuple[int, int, int]]:
    """(b, h, w) of random images: as many kinds as the file takes."""
    height, width = given.shape
    if given.dynamic == "none":
        return [(1, height, width)] * 2
    if given.dynamic == "batch":
        return [(1, height, width), (4, height, width)]
    least, step = given.least, given.multiple
    return [(1, height, width), (2, width, height), (3, least * step, (least + 3) * step)]


def largest_difference(
    file: Callable[[Tensor], Tensor], model: Callable[[Tensor], Tensor], given: Input, channels: int
) -> float:
    """Over random images of all those sizes: the largest difference of logits, as a part of the largest; infinite
    where one is not finite, or there are not as many."""
    random = torch.Generator().manual_seed(0)
    worst = 0.0
    for images, height, width in sizes_to_check(given):
        coarse = torch.rand(images, channels, -(-height // GRAIN), -(-width // GRAIN), generator=random)
        image = 255 * F.interpolate(coarse, (height, width), mode="bilinear")
        with torch.no_grad():
            expected = model(image)
        found = file(image)
        if found.shape != expected.shape:
            return float("inf")
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, difference) if difference == difference else float("inf")
    return worst
