"""InternViT as a segmentation backbone, with the constructor arguments, parameter names and numbers that InternVL published.

In: images (b, 3, h, w), h and w multiples of the patch size. Out: feature maps of chosen blocks. Knows nothing of DeepSpeed and never chooses a
dtype: it follows its input's. Every module that owns parameters can draw them anew (`reset_parameters`), so that they may be built in pieces.
Source: Chen et al., "InternVL" (2023), and OpenGVLab/InternVL `segmentation/mmseg_custom/models/backbones/intern_vit_6b.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.models.attention import attention
from internseg_ds.models.intern_vit_keys import (
    LAYOUTS,
    arguments_of,
    exported_config,
    exported_names,
    published_sources,
)
from internseg_ds.models.layers import DropPath, TruncNormalLinear
from internseg_ds.models.norms import NORMS, ChannelsFirstLayerNorm, RMSNorm
from internseg_ds.models.recomputation import Recomputation, run_block
from internseg_ds.models.resizing import (
    is_patch_kernel,
    is_square_embedding,
    resize_patch_kernel,
    resize_position_embedding,
    resize_to_shape,
)


class UpConv(nn.ConvTranspose2d):
    """A 2x2 transposed convolution of stride 2 that starts from a normal of variance 2 / (4 c) and zero bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, kernel_size=2, stride=2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=math.sqrt(2 / (4 * self.out_channels)))
        nn.init.zeros_(self.bias)


class HalvingPool(nn.MaxPool2d):
    """A 2x2 max pooling that leaves a side of one element as it is, where torch's refuses."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, max(1, h // 2), max(1, w // 2))."""
        kernel = [min(self.kernel_size, side) for side in x.shape[2:]]
        return F.max_pool2d(x, kernel, stride=kernel)


class LayerScale(nn.Module):
    """x * gamma per channel (Touvron et al., CaiT, 2021)."""

    def __init__(self, width: int, init_values: float, force_fp32: bool) -> None:
        super().__init__()
        self.init_values, self.force_fp32 = init_values, force_fp32
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape and dtype."""
        compute = (
            torch.float32 if self.force_fp32 else x.dtype
        )  # without the cast, fp32 parameters under autocast would make the residuals fp32
        return (x.to(compute) * self.gamma.to(compute)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised over the whole width, all heads together, before the split into heads."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        qkv_bias: bool,
        qk_normalization: bool,
        use_flash_attn: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.num_heads, self.use_flash_attn = num_heads, use_flash_attn
        self.qkv = TruncNormalLinear(width, 3 * width, bias=qkv_bias)
        self.q_norm = RMSNorm(width, eps) if qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(width, eps) if qk_normalization else nn.Identity()
        self.proj = TruncNormalLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (b, n, c) each
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)) for part in (self.q_norm(q), self.k_norm(k), v)
        )  # (b, n, heads, c / heads)
        return self.proj(attention(q, k, v, use_flash_attn=self.use_flash_attn).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(width, hidden)
        self.fc2 = TruncNormalLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + drop_path(ls1(attn(norm1 x))), then the same with the MLP. init_values 0: no layer scale."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_normalization: bool,
        drop_path: float,
        init_values: float,
        force_fp32: bool,
        use_flash_attn: bool,
        norm_type: str,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norm_type](width, eps)
        self.attn = Attention(width, num_heads, qkv_bias, qk_normalization, use_flash_attn, eps)
        self.ls1 = LayerScale(width, init_values, force_fp32) if init_values else nn.Identity()
        self.norm2 = NORMS[norm_type](width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = LayerScale(width, init_values, force_fp32) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (b, n, c) -> the same shape."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """The image cut into patches, each projected to a token."""

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, c, h / patch, w / patch)."""
        return self.proj(image)


@BACKBONES.register_module()
class InternViT6B(BaseModule):
    """The InternViT backbone (6 B parameters by default, 5.9 B of them in 48 blocks of 122.9 M).

    img_size: side of the image whose grid the position embedding has; other sizes are resized to at run time. pretrain_size: that of the weights to be
    loaded, kept for the published configs (the grid is read from the file). out_indices: blocks whose patch tokens become feature maps. with_fpn: four
    maps, at 4x, 2x, 1x and 1/2 of the patch grid. with_cp: recompute each block in the backward pass, or what the attribute
    `recomputation` says. freeze_vit: the ViT neither trains nor keeps a graph; the FPN layers train. pretrained (or mmcv's init_cfg): weight file that
    the engine loads. norm_type ("rms_norm" or "layer_norm") and layer_norm_eps: of the blocks; InternViT-300M has LayerNorm, qkv_bias and no
    qk_normalization. Raises ValueError for sizes that do not fit each other.
    """

    follows_dtype = True
    """It computes in the dtype of its input, whatever that is."""
    resizable = {
        "pos_embed": (is_square_embedding, resize_to_shape),
        "patch_embed.proj.weight": (is_patch_kernel, resize_patch_kernel),
    }
    """Parameters whose shape in a weight file may differ: which (file's, model's) shapes can be brought together, and how."""
    pretrained_extras = ("clip_projector.", "layernorm.")
    """Prefixes of what published weight files hold beside the backbone."""
    not_pretrained = ("up1.", "up2.", "up3.", "up4.")
    """Prefixes of what they lack: it is trained from its initial values."""
    published_sources, arguments_of = staticmethod(published_sources), staticmethod(arguments_of)
    """How other layouts name its parameters, and what a config.json says of its arguments."""
    layouts = ("internvl", *LAYOUTS)
    """Layouts that it can be exported in."""

    def __init__(
        self,
        in_chans: int = 3,
        patch_size: int = 14,
        img_size: int = 224,
        pretrain_size: int = 224,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        embed_dim: int = 3200,
        num_heads: int = 25,
        mlp_ratio: float = 4,
        init_values: float = 0.1,
        qk_normalization: bool = True,
        depth: int = 48,
        use_flash_attn: bool = True,
        with_cp: bool = True,
        layerscale_force_fp32: bool = False,
        out_indices: Sequence[int] = (7, 11, 15, 23),
        freeze_vit: bool = False,
        with_fpn: bool = False,
        with_final_norm: bool = False,
        pretrained: str | None = None,
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if norm_type not in NORMS:
            raise ValueError(f"norm_type={norm_type!r} is none of {', '.join(NORMS)}")
        sizes = dict(
            in_chans=in_chans,
            patch_size=patch_size,
            img_size=img_size,
            embed_dim=embed_dim,
            num_heads=num_heads,
            depth=depth,
        )
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        if img_size % patch_size:
            below = img_size // patch_size * patch_size
            raise ValueError(
                f"img_size={img_size} is not a multiple of patch_size={patch_size}; use {below} or {below + patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        if (
            not out_indices
            or not all(0 <= index < depth for index in out_indices)
            or list(out_indices) != sorted(set(out_indices))
        ):
            raise ValueError(
                f"out_indices={list(out_indices)} must name blocks 0 to {depth - 1} of depth={depth}, ascending"
            )
        if with_fpn and len(out_indices) != 4:
            raise ValueError(f"with_fpn=True needs 4 out_indices, not {list(out_indices)}")
        self.patch_size, self.embed_dim, self.depth = patch_size, embed_dim, depth
        self.pretrain_size, self.pretrained = pretrain_size, pretrained
        self.img_size, self.init_values = img_size, init_values
        self.arguments = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_normalization": qk_normalization,
            "norm_type": norm_type,
            "layer_norm_eps": layer_norm_eps,
        }
        self.out_indices, self.with_cp, self.freeze_vit, self.with_fpn = (
            tuple(out_indices),
            with_cp,
            freeze_vit,
            with_fpn,
        )
        self.recomputation: Recomputation = "blocks"

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.reset_parameters()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_normalization,
                drop_path_rate * index / max(depth - 1, 1),
                init_values,
                layerscale_force_fp32,
                use_flash_attn,
                norm_type,
                layer_norm_eps,
            )
            for index in range(depth)
        )
        if freeze_vit:
            self.requires_grad_(False)  # before the FPN layers, which train
        if with_fpn:
            last = (lambda: [ChannelsFirstLayerNorm(embed_dim)]) if with_final_norm else list
            self.up1 = nn.Sequential(
                UpConv(embed_dim), ChannelsFirstLayerNorm(embed_dim), nn.GELU(), UpConv(embed_dim), *last()
            )
            self.up2 = nn.Sequential(UpConv(embed_dim), *last())
            self.up3 = nn.Sequential(nn.Identity(), *last())
            self.up4 = nn.Sequential(HalvingPool(kernel_size=2, stride=2), *last())

    def reset_parameters(self) -> None:
        """Draws the class token and the position embedding; the other modules draw their own."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], dict[str, object] | None]:
        """Names of the ViT's parameters in one of `layouts`, and its config.json where it has one."""
        return exported_names(layout, self.depth), exported_config(
            layout, self.arguments, self.img_size, self.patch_size, self.init_values
        )

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning-rate decay; name is relative to the backbone.

        0: class token, position embedding, patch embedding; n + 1: block n; depth + 1: everything after the blocks.
        """
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image (b, 3, h, w) -> one map (b, c, h / patch, w / patch) per out_index, or the four maps of the FPN, in the dtype that the blocks compute in.

        Raises ValueError when h or w is not a multiple of the patch size.
        """
        if image.size(2) % self.patch_size or image.size(3) % self.patch_size:
            raise ValueError(
                f"image of {image.size(2)} x {image.size(3)} pixels is not a multiple of the patch size {self.patch_size}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            maps = self._maps(image)
        if self.with_fpn:
            maps = [up(features) for up, features in zip((self.up1, self.up2, self.up3, self.up4), maps)]
        return tuple(features.contiguous() for features in maps)

    def _maps(self, image: Tensor) -> list[Tensor]:
        patches = self.patch_embed(image)  # (b, c, h / patch, w / patch)
        grid = (patches.size(2), patches.size(3))
        tokens = torch.cat(
            [self.cls_token.to(patches.dtype).expand(len(patches), -1, -1), patches.flatten(2).mT], dim=1
        )  # (b, 1 + n, c)
        x = tokens + resize_position_embedding(self.pos_embed, grid).to(tokens.dtype)
        maps = []
        for index, block in zip(
            range(self.out_indices[-1] + 1), self.blocks
        ):  # no output depends on the blocks after these
            x = run_block(
                block,
                x,
                index=index,
                recomputation=self.recomputation if self.with_cp and self.training else "none",
            )
            if index in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, grid))  # (b, 1 + n, c) -> (b, c, h / patch, w / patch)
        return maps

    def train(self, mode: bool = True) -> "InternViT6B":
        """A frozen ViT stays in eval mode."""
        super().train(mode)
        if self.freeze_vit:
            self.blocks.eval()
        return self
