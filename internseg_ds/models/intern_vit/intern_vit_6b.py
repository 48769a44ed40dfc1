"""InternViT as a segmentation backbone, with the constructor arguments, parameter names and numbers that
InternVL published.

In: images (b, 3, h, w), h and w multiples of the patch size. Out: feature maps of chosen blocks. Letters: b
images, (h, w) a size, n tokens, c channels. Knows nothing of DeepSpeed and never chooses a dtype: it computes
in its input's. Every module that owns parameters can draw its initial values again (`reset_parameters`), so
that they may be built in pieces. Source: Chen et al., "InternVL" (2023), and OpenGVLab/InternVL
`segmentation/mmseg_custom/models/backbones/intern_vit_6b.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.runner import BaseModule
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import CheckpointingPolicy, run_block
from internseg_ds.models.feature_pyramids import pyramid_stages
from internseg_ds.models.intern_vit.attention import attention
from internseg_ds.models.intern_vit.published_keys import (
    LAYOUTS,
    arguments_of,
    exported_config,
    exported_names,
    published_sources,
    recognises,
)
from internseg_ds.models.layers import DropPath, TruncNormalLinear
from internseg_ds.models.norms import NORMS, RMSNorm
from internseg_ds.models.weight_resizing import (
    is_patch_kernel,
    is_square_embedding,
    resize_patch_kernel,
    resize_position_embedding,
    resize_to_shape,
)


class LayerScale(nn.Module):
    """x * gamma per channel (Touvron et al., CaiT, 2021). force_fp32: computes in fp32, whatever dtype x
    has."""

    def __init__(self, width: int, init_values: float, force_fp32: bool) -> None:
        super().__init__()
        self.init_values = init_values
        self.force_fp32 = force_fp32
        self.gamma = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> the same shape and dtype."""
        # without the cast, fp32 parameters under autocast would make the residuals fp32
        compute = torch.float32 if self.force_fp32 else x.dtype
        return (x.to(compute) * self.gamma.to(compute)).to(x.dtype)


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of an InternViT have in common."""

    width: int
    """Channels of a token."""
    num_heads: int
    mlp_ratio: float
    """Hidden width of the MLP over `width`."""
    qkv_bias: bool
    qk_normalization: bool
    init_values: float
    """Initial layer scale; 0: no layer scale."""
    force_fp32: bool
    """Of the layer scale."""
    use_flash_attn: bool
    norm_type: str
    """A key of `NORMS`."""
    eps: float
    """Of all norms."""


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalised over the whole width, all heads together,
    before the split into heads."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        width = settings.width
        self.num_heads = settings.num_heads
        self.use_flash_attn = settings.use_flash_attn
        self.qkv = TruncNormalLinear(width, 3 * width, bias=settings.qkv_bias)
        self.q_norm = RMSNorm(width, settings.eps) if settings.qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(width, settings.eps) if settings.qk_normalization else nn.Identity()
        self.proj = TruncNormalLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape and dtype."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (b, n, c) each
        heads = (self.num_heads, -1)
        q = self.q_norm(q).unflatten(-1, heads)  # (b, n, heads, c / heads)
        k = self.k_norm(k).unflatten(-1, heads)
        v = v.unflatten(-1, heads)
        return self.proj(attention(q, k, v, use_flash_attn=self.use_flash_attn).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = TruncNormalLinear(width, hidden)
        self.fc2 = TruncNormalLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape and dtype."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + drop_path(ls1(attn(norm1 x))), then the same with the MLP. drop_path: probability."""

    def __init__(self, settings: BlockSettings, drop_path: float) -> None:
        super().__init__()
        width = settings.width
        self.norm1 = NORMS[settings.norm_type](width, settings.eps)
        self.attn = Attention(settings)
        self.ls1 = _layer_scale(settings)
        self.norm2 = NORMS[settings.norm_type](width, settings.eps)
        self.mlp = Mlp(width, int(width * settings.mlp_ratio))
        self.ls2 = _layer_scale(settings)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape and dtype."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def _layer_scale(settings: BlockSettings) -> nn.Module:
    if not settings.init_values:
        return nn.Identity()
    return LayerScale(settings.width, settings.init_values, settings.force_fp32)


class PatchEmbed(nn.Module):
    """Splits the image into patches and projects each to a token."""

    def __init__(self, in_chans: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) -> (b, c, h / patch, w / patch) in the same dtype."""
        return self.proj(image)


@BACKBONES.register_module()
class InternViT6B(BaseModule):
    """The InternViT backbone (6 B parameters by default, 5.9 B of them in 48 blocks of 122.9 M).

    in_chans: channels of the images; weights of three are adapted at load (`weight_resizing.adapt_channels`).
    img_size: side of the image whose patch grid the position embedding has; for other images it is resized in
    the forward. pretrain_size: that of the weights to be loaded, kept for the published configs (the grid is
    read from the file). out_indices: blocks whose patch tokens become feature maps. with_fpn: four maps, at
    4x, 2x, 1x and 1/2 of the patch grid. with_cp: activation checkpointing of each block, or what the
    attribute `recomputation` says. freeze_vit: the ViT neither trains nor keeps a graph; the FPN layers
    train. pretrained (or mmcv's init_cfg): weight file that the engine loads. norm_type ("rms_norm" or
    "layer_norm") and layer_norm_eps: of the blocks; InternViT-300M has LayerNorm, qkv_bias and no
    qk_normalization. Raises ValueError for sizes that contradict each other.
    """

    # what these attributes mean: `Backbone` in models/backbone.py
    channels_setting = "in_chans"
    follows_dtype = True
    resizable = {
        "pos_embed": (is_square_embedding, resize_to_shape),
        "patch_embed.proj.weight": (is_patch_kernel, resize_patch_kernel),
    }
    pretrained_extras: tuple[str, ...] = ("clip_projector.", "layernorm.")
    not_pretrained: tuple[str, ...] = ("up1.", "up2.", "up3.", "up4.")
    published_sources = staticmethod(published_sources)
    arguments_of = staticmethod(arguments_of)
    recognises = staticmethod(recognises)
    layouts: tuple[str, ...] = ("internvl", *LAYOUTS)

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
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if norm_type not in NORMS:
            raise ValueError(f"norm_type={norm_type!r} is none of {', '.join(NORMS)}")
        _check_sizes(
            in_chans=in_chans,
            patch_size=patch_size,
            img_size=img_size,
            embed_dim=embed_dim,
            num_heads=num_heads,
            depth=depth,
        )
        _check_out_indices(out_indices, depth)
        if with_fpn and len(out_indices) != 4:
            raise ValueError(f"with_fpn=True needs 4 out_indices, not {list(out_indices)}")
        self.image_channels = in_chans
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.depth = depth
        self.pretrain_size = pretrain_size
        self.pretrained = pretrained
        self.img_size = img_size
        self.init_values = init_values
        self.arguments: dict[str, Any] = {
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "depth": depth,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "qk_normalization": qk_normalization,
            "norm_type": norm_type,
            "layer_norm_eps": layer_norm_eps,
        }
        self.out_indices = tuple(out_indices)
        self.with_cp = with_cp
        self.freeze_vit = freeze_vit
        self.with_fpn = with_fpn
        self.recomputation: CheckpointingPolicy = "blocks"

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.reset_parameters()
        settings = BlockSettings(
            width=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_normalization=qk_normalization,
            init_values=init_values,
            force_fp32=layerscale_force_fp32,
            use_flash_attn=use_flash_attn,
            norm_type=norm_type,
            eps=layer_norm_eps,
        )
        # the drop-path rate grows linearly with depth
        self.blocks = nn.ModuleList(
            Block(settings, drop_path_rate * index / max(depth - 1, 1)) for index in range(depth)
        )
        if freeze_vit:
            self.requires_grad_(False)  # before the FPN layers, which train
        if with_fpn:
            self.up1, self.up2, self.up3, self.up4 = pyramid_stages(embed_dim, with_norm=with_final_norm)

    def reset_parameters(self) -> None:
        """Draw the class token and the position embedding; the other modules draw their own."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], dict[str, Any] | None]:
        """Our name -> keys of the ViT's parameters in one of `layouts`, and its config.json where it has
        one."""
        return exported_names(layout, self.depth), exported_config(
            layout, self.arguments, self.img_size, self.patch_size, self.init_values
        )

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning-rate decay; name is relative to the backbone.

        0: class token, position embedding, patch embedding; n + 1: block n; depth + 1: everything after the
        blocks.
        """
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.depth + 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image: (b, 3, h, w) -> one map (b, c, h / patch, w / patch) per block in out_indices, or the four
        maps of the FPN, in the dtype that the blocks compute in.

        Raises ValueError when h or w is not a multiple of the patch size.
        """
        if image.size(2) % self.patch_size or image.size(3) % self.patch_size:
            raise ValueError(
                f"image of {image.size(2)} x {image.size(3)} pixels is not a multiple of the patch size "
                f"{self.patch_size}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            maps = self._patch_maps(image)
        if self.with_fpn:
            maps = [up(features) for up, features in zip((self.up1, self.up2, self.up3, self.up4), maps)]
        return tuple(features.contiguous() for features in maps)

    def _patch_maps(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h / patch, w / patch) per block in out_indices."""
        patches = self.patch_embed(image)  # (b, c, h / patch, w / patch)
        grid = (patches.size(2), patches.size(3))
        cls_tokens = self.cls_token.to(patches.dtype).expand(patches.size(0), -1, -1)
        tokens = torch.cat([cls_tokens, patches.flatten(2).mT], dim=1)  # (b, 1 + n, c)
        x = tokens + resize_position_embedding(self.pos_embed, grid).to(tokens.dtype)
        maps = []
        # no output depends on the blocks behind the last of out_indices
        for index in range(self.out_indices[-1] + 1):
            x = self._run_block(index, x)
            if index in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, grid))  # (b, 1 + n, c) -> (b, c, h / patch, w / patch)
        return maps

    def _run_block(self, index: int, x: Tensor) -> Tensor:
        """x: (b, n, c) -> the same shape and dtype: block `index`, with activation checkpointing in
        training."""
        recomputation = self.recomputation if self.with_cp and self.training else "none"
        return run_block(self.blocks[index], x, index=index, recomputation=recomputation)

    def train(self, mode: bool = True) -> "InternViT6B":
        """As nn.Module's, but the blocks of a frozen ViT stay in eval mode."""
        super().train(mode)
        if self.freeze_vit:
            self.blocks.eval()
        return self


def _check_sizes(**sizes: int) -> None:
    """sizes: arguments of InternViT6B. Raise ValueError for what is no size, and for sizes that do not
    divide each other."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
    img_size = sizes["img_size"]
    patch_size = sizes["patch_size"]
    if img_size % patch_size:
        below = img_size // patch_size * patch_size
        raise ValueError(
            f"img_size={img_size} is not a multiple of patch_size={patch_size}; use {below} or "
            f"{below + patch_size}"
        )
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ValueError(
            f"embed_dim={sizes['embed_dim']} is not a multiple of num_heads={sizes['num_heads']}"
        )


def _check_out_indices(out_indices: Sequence[int], depth: int) -> None:
    """Raise ValueError unless they name blocks, at least one, in ascending order."""
    known = all(0 <= index < depth for index in out_indices)
    if not out_indices or not known or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(
            f"out_indices={list(out_indices)} must name blocks 0 to {depth - 1} of depth={depth}, ascending"
        )
