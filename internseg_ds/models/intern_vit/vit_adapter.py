"""InternViT with a ViT-Adapter as a segmentation backbone: four maps at 1/4 to 1/32 of the image out of a ViT
that may stay frozen.

In: images (b, 3, h, w), h and w multiples of twice the patch size. Out: feature maps. Letters: b images, (h,
w) a size, n tokens of the ViT, N tokens of the pyramid's three maps, c channels. Knows nothing of DeepSpeed
and never chooses a dtype: it computes in its input's. Source: Chen et al., "Vision Transformer Adapter for
Dense Predictions", 2023; arguments and parameter names of OpenGVLab/InternVL-MMDetSeg
(`mmsegmentation/mmseg/models/backbones/vit_adapter.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.feature_pyramids import UpConv
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.models.intern_vit.vit_adapter_modules import (
    AdapterSettings,
    Interaction,
    Shapes,
    SpatialPrior,
    maps_of,
)
from internseg_ds.models.norms import ChannelsFirstLayerNorm
from internseg_ds.models.sampling.deformable_attention import pixel_centres
from internseg_ds.models.weight_resizing import resize_position_embedding


@BACKBONES.register_module()
class InternViTAdapter(InternViT6B):
    """The published class: `InternViT6B` without its class token, and an adapter around its blocks.

    interaction_indexes: (first, last) block of each part of the ViT, before which an injector and behind
    which extractors stand. conv_inplane: channels of the pyramid's stem. n_points: points that each head of
    the adapter's attention samples in each map. deform_num_heads: number of those heads; None: as many as the
    ViT has. (The published default of 6 does not divide 3,200 channels: that code cannot build its own 6 B
    config.) deform_ratio, cffn_ratio: widths of that attention's values and of the MLPs over embed_dim.
    init_values: initial value of the injectors' scale; that of the blocks' layer scale is InternViT6B's
    default. add_vit_feature: the ViT's last tokens are added to the four maps. use_final_norm: a LayerNorm
    for each map. out_indices: maps 0 to 3 that are returned, all or the last three. freeze_vit: blocks and
    embeddings of the ViT do not train; gradients flow through them. (The published class freezes them
    always.) The other arguments are InternViT6B's; it has no FPN. Raises ValueError for sizes that contradict
    each other.
    """

    pretrained_extras = (*InternViT6B.pretrained_extras, "cls_token")
    not_pretrained = ("level_embed", "spm.", "interactions.", "up.", "norm1.", "norm2.", "norm3.", "norm4.")
    layouts = ()  # it cannot be exported: no published layout holds an adapter

    def __init__(
        self,
        patch_size: int = 16,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int | None = None,
        init_values: float = 0.0,
        interaction_indexes: Sequence[Sequence[int]] = (),
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_vit_feature: bool = True,
        use_extra_extractor: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        use_final_norm: bool = True,
        with_fpn: bool = False,
        drop_path_rate: float = 0.0,
        depth: int = 48,
        **vit: Any,
    ) -> None:
        if tuple(out_indices) not in ((0, 1, 2, 3), (1, 2, 3)) or with_fpn:
            raise ValueError(
                f"out_indices={list(out_indices)}, with_fpn={with_fpn}: a ViT-Adapter returns maps [0, 1, 2, "
                "3] or [1, 2, 3], without an FPN"
            )
        _check_interaction_indexes(interaction_indexes, depth)
        freeze_vit = vit.pop("freeze_vit", False)
        super().__init__(
            patch_size=patch_size, drop_path_rate=drop_path_rate, depth=depth, out_indices=[depth - 1], **vit
        )
        del self.cls_token
        self.vit_patch = patch_size
        self.patch_size = 2 * patch_size  # the coarsest map halves the ViT's grid
        self.freeze_vit = freeze_vit
        self.out_indices = tuple(out_indices)
        self.parts = tuple((part[0], part[-1] + 1) for part in interaction_indexes)
        self.add_vit_feature = add_vit_feature
        if freeze_vit:
            self.requires_grad_(False)  # before the adapter's layers, which train
        width = self.embed_dim
        settings = AdapterSettings(
            width=width,
            heads=self.arguments["num_heads"] if deform_num_heads is None else deform_num_heads,
            points=n_points,
            ratio=deform_ratio,
            hidden=int(width * cffn_ratio) if with_cffn else None,
            drop_path=drop_path_rate,
            init_values=init_values,
        )
        self.level_embed = nn.Parameter(torch.empty(3, width))
        self.spm = SpatialPrior(self.image_channels, conv_inplane, width, finest=len(out_indices) == 4)
        last = len(self.parts) - 1
        self.interactions = nn.ModuleList(
            Interaction(settings, extra_extractors=2 if use_extra_extractor and index == last else 0)
            for index in range(len(self.parts))
        )
        self.up = UpConv(width) if len(out_indices) == 4 else None
        if use_final_norm:
            for index in out_indices:
                setattr(self, f"norm{index + 1}", ChannelsFirstLayerNorm(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the embeddings; the other modules draw their own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if hasattr(self, "level_embed"):  # not yet when InternViT6B's constructor calls this
            nn.init.normal_(self.level_embed)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image: (b, 3, h, w) -> maps (b, c, h / 4, w / 4) to (b, c, h / 32, w / 32) for patches of 16
        pixels, those of out_indices, in the dtype that the blocks compute in.

        Raises ValueError when h or w is not a multiple of twice the patch size.
        """
        if image.size(2) % self.patch_size or image.size(3) % self.patch_size:
            raise ValueError(
                f"image of {image.size(2)} x {image.size(3)} pixels is not a multiple of "
                f"{self.patch_size}, twice the patch size"
            )
        finest, *coarse = self.spm(image)
        shapes = [(features.size(2), features.size(3)) for features in coarse]
        levels = [
            features.flatten(2).mT + level.to(features.dtype)
            for features, level in zip(coarse, self.level_embed, strict=True)
        ]
        pyramid = torch.cat(levels, 1)  # (b, N, c)
        patches = self.patch_embed(image)
        grid = (patches.size(2), patches.size(3))
        position = resize_position_embedding(self.pos_embed, grid)[:, 1:]  # without the class token's
        x = patches.flatten(2).mT + position.to(patches.dtype)  # (b, n, c)
        x, pyramid = self._interact(x, pyramid, grid, shapes)
        maps = maps_of(pyramid, shapes)
        if self.up is not None:
            maps.insert(0, self.up(maps[0]) + finest)
        if self.add_vit_feature:
            vit_map = x.mT.unflatten(2, grid)
            maps = [features + _resized(vit_map, features.shape[2:]) for features in maps]
        return tuple(
            getattr(self, f"norm{index + 1}", nn.Identity())(features).contiguous()
            for index, features in zip(self.out_indices, maps, strict=True)
        )

    def _interact(
        self, x: Tensor, pyramid: Tensor, grid: tuple[int, int], shapes: Shapes
    ) -> tuple[Tensor, Tensor]:
        """Run the ViT's blocks, with injectors and extractors between them.

        x: (b, n, c), tokens of the ViT, whose patches form `grid` (h, w). pyramid: (b, N, c), tokens of maps
        of these shapes. Returns both, in their shapes and dtypes.
        """
        around_tokens = pixel_centres([grid], x)
        around_pixels = pixel_centres(shapes, x)
        interactions: list[Any] = list(self.interactions)
        for (first, end), interaction in zip(self.parts, interactions, strict=True):
            x = self._run(interaction.injector, x, around_tokens, pyramid, shapes)
            for index in range(first, end):
                x = self._run_block(index, x)
            for extractor in interaction.extractors:
                pyramid = self._run(extractor, pyramid, around_pixels, x, grid, shapes)
        return x, pyramid

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        """Run an injector or extractor, with activation checkpointing where blocks have it. inputs: its
        arguments. Returns (b, n or N, c)."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


def _resized(features: Tensor, size: torch.Size) -> Tensor:
    """features: (b, c, h, w) -> (b, c, *size) in the same dtype, and unchanged where that is its size."""
    if features.shape[2:] == size:
        return features
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def _check_interaction_indexes(indexes: Sequence[Sequence[int]], depth: int) -> None:
    """Raise ValueError unless each pair (first, last) begins behind the one before, and all `depth` blocks
    belong to one."""
    bounds = [index for part in indexes for index in (part[0], part[-1])]
    begins = bounds[::2]
    ends = [-1, *bounds[1::2]]
    adjacent = begins == [end + 1 for end in ends[:-1]]
    if not bounds or ends[-1] != depth - 1 or bounds != sorted(bounds) or not adjacent:
        raise ValueError(
            f"interaction_indexes={[list(part) for part in indexes]} must divide blocks 0 to {depth - 1} of "
            f"depth={depth} into parts, as [[0, {depth // 2 - 1}], [{depth // 2}, {depth - 1}]]"
        )
