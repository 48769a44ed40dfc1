"""Position embeddings and patch kernels of Vision Transformers at other sizes, and of images of other channels, than
they were trained at.

In: tensors as weight files hold them. Out: the same in the shape that a model has. Whether a tensor can be
resized is decided from the two shapes alone, before anything is read. Letters: c channels; (h, w) the patch
grid; s the side of a square patch grid; p, q sides of a patch in pixels; i, j channels of an image.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_position_embedding(pos_embed: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resize a position embedding, `prefix` tokens (the class token) first, bicubically to a patch grid.

    pos_embed: (1, prefix + s * s, c), any float dtype. grid: (h, w). Returns (1, prefix + h * w, c) in the same
    dtype, and `pos_embed` itself when the grid is (s, s). Interpolates in fp32 with align_corners=False, as the
    published InternViT code does.
    """
    side = math.isqrt(pos_embed.size(1) - prefix)
    known = not any(isinstance(size, torch.SymInt) for size in grid)  # at run time, in an exported program
    if known and grid == (side, side):
        return pos_embed
    patches = pos_embed[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, c, s, s)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :prefix], patches.flatten(2).mT.to(pos_embed.dtype)], dim=1)


def resize_patch_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    """Resize a patch kernel (c, i, p, p) of any float dtype to `shape` (c, j, q, q), float32: bicubically to another
    patch, and to other channels by `adapt_channels`."""
    kernel = adapt_channels(kernel, shape)
    if kernel.shape == shape:
        return kernel
    return F.interpolate(kernel, size=shape[2:], mode="bicubic", align_corners=False)


def adapt_channels(kernel: Tensor, shape: torch.Size) -> Tensor:
    """A convolution's kernel (c, i, p, q) of any float dtype for images of the j channels of `shape` (c, j, ...),
    float32 (c, j, p, q), by `channels_rule`.

    The sum over an image whose channels are all alike stays what it was, where i divides j, or j is 1. It is the
    rule by which timm adapts its weights (`timm.models._manipulate.adapt_input_conv`).
    """
    known, wanted = kernel.size(1), shape[1]
    kernel = kernel.float()
    if known == wanted:
        return kernel
    if wanted == 1:
        return kernel.sum(dim=1, keepdim=True)
    repeated = kernel.repeat(1, math.ceil(wanted / known), 1, 1)[:, :wanted]
    return repeated * (known / wanted)


def channels_rule(in_file: torch.Size, in_model: torch.Size) -> str:
    """How a kernel in a file becomes one for images of other channels, in words; "" where it does not, or the
    shapes are of no kernels."""
    if len(in_file) != 4 or len(in_model) != 4 or in_file[1] == in_model[1]:
        return ""
    known, wanted = in_file[1], in_model[1]
    if wanted == 1:
        return f"from {known} image channels to 1: their sum"
    return f"from {known} image channels to {wanted}: channel n is channel n modulo {known}, times {known}/{wanted}"


def resize_to_shape(pos_embed: Tensor, shape: torch.Size) -> Tensor:
    """Resize a position embedding (1, 1 + s' * s', c) to the square grid of `shape` (1, 1 + s * s, c)."""
    side = math.isqrt(shape[1] - 1)
    return resize_position_embedding(pos_embed, (side, side))


def is_square_embedding(in_file: torch.Size, in_model: torch.Size, prefix: int = 1) -> bool:
    """Whether `in_file` is (1, prefix + s * s, c), so many tokens and a square grid, with the c of
    `in_model`."""
    return (
        len(in_file) == 3
        and in_file[0] == 1
        and in_file[1] > prefix
        and math.isqrt(in_file[1] - prefix) ** 2 == in_file[1] - prefix
        and in_file[2] == in_model[2]
    )


def is_patch_kernel(in_file: torch.Size, in_model: torch.Size) -> bool:
    """Whether `in_file` (c, i, p, p) differs from `in_model` in the patch size and the image's channels alone."""
    return len(in_file) == len(in_model) == 4 and in_file[0] == in_model[0]


def is_image_kernel(in_file: torch.Size, in_model: torch.Size) -> bool:
    """Whether `in_file` (c, i, p, q) differs from `in_model` in the image's channels alone."""
    return is_patch_kernel(in_file, in_model) and in_file[2:] == in_model[2:]
