"""Position embeddings and patch kernels of Vision Transformers at other sizes than they were made for.

In: tensors as weight files hold them. Out: the same in the shape that a model has. Whether two shapes can be brought together is told from the shapes alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_position_embedding(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, 1 + s * s, c), class token first, resized bicubically to a grid (h, w): (1, 1 + h * w, c), in its dtype.

    The interpolation runs in fp32, align_corners False. Returned as it is when the grid is the stored one.
    """
    side = math.isqrt(pos_embed.size(1) - 1)
    if grid == (side, side):
        return pos_embed
    patches = pos_embed[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, c, s, s)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).mT.to(pos_embed.dtype)], dim=1)


def resize_patch_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A patch kernel (c, 3, p, p) resized bicubically to `shape` (c, 3, q, q), in fp32, align_corners False."""
    return F.interpolate(kernel.float(), size=shape[2:], mode="bicubic", align_corners=False)


def resize_to_shape(pos_embed: Tensor, shape: torch.Size) -> Tensor:
    """A stored position embedding resized to the square grid of `shape` (1, 1 + s * s, c)."""
    side = math.isqrt(shape[1] - 1)
    return resize_position_embedding(pos_embed, (side, side))


def is_square_embedding(stored: torch.Size, wanted: torch.Size) -> bool:
    """Whether `stored` is (1, 1 + s * s, c) with the c of `wanted`: a class token and a square grid."""
    return (
        len(stored) == 3
        and stored[0] == 1
        and stored[1] > 1
        and math.isqrt(stored[1] - 1) ** 2 == stored[1] - 1
        and stored[2] == wanted[2]
    )


def is_patch_kernel(stored: torch.Size, wanted: torch.Size) -> bool:
    """Whether `stored` (c, channels, p, p) differs from `wanted` in the patch size alone."""
    return len(stored) == 4 and stored[:2] == wanted[:2]
