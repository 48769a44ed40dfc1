"""InternViT with a ViT-Adapter as a segmentation backbone: four maps at 1/4 to 1/32 of the image out of a ViT that may stay frozen.

In: images (b, 3, h, w), h and w multiples of twice the patch size. Knows nothing of DeepSpeed and never chooses a dtype.
Source: Chen et al., "Vision Transformer Adapter for Dense Predictions", 2023; arguments and parameter names of OpenGVLab/InternVL-MMDetSeg
(`mmsegmentation/mmseg/models/backbones/vit_adapter.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internseg_ds.models.deformable_attention import pixel_centres
from internseg_ds.models.intern_vit_6b import InternViT6B, UpConv
from internseg_ds.models.norms import ChannelsFirstLayerNorm
from internseg_ds.models.recomputation import run_block
from internseg_ds.models.resizing import resize_position_embedding
from internseg_ds.models.vit_adapter_modules import Interaction, SpatialPrior


@BACKBONES.register_module()
class InternViTAdapter(InternViT6B):
    """The published class: `InternViT6B` without its class token, and an adapter around its blocks.

    interaction_indexes: (first, last) block of each part of the ViT before which the pyramid is injected and behind which it is extracted. conv_inplane:
    channels of the pyramid's stem. n_points: places that each head of the adapter's attention looks at in each map. deform_num_heads: those heads; None:
    as many as the ViT has. (The published default of 6 does not divide 3,200 channels: that code cannot build its own 6 B config.) deform_ratio, cffn_ratio:
    widths of that attention's values and of the MLPs over embed_dim. init_values: what the injectors' scale starts from; that of the blocks' layer scale
    is InternViT6B's default. add_vit_feature: the ViT's last tokens are added to the four maps. use_final_norm: a LayerNorm for each map. out_indices: maps
    0 to 3 that are put out, all or the last three. freeze_vit: blocks and embeddings of the ViT do not train; gradients flow through them. (The published
    class freezes them always.) The other arguments are InternViT6B's; it has no FPN. Raises ValueError for sizes that do not fit each other.
    """

    pretrained_extras = (*InternViT6B.pretrained_extras, "cls_token")
    not_pretrained = ("level_embed", "spm.", "interactions.", "up.", "norm1.", "norm2.", "norm3.", "norm4.")
    layouts = ()

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
                f"out_indices={list(out_indices)}, with_fpn={with_fpn}: a ViT-Adapter puts out maps [0, 1, 2, 3] or [1, 2, 3], without an FPN"
            )
        flat = [index for first_last in interaction_indexes for index in (first_last[0], first_last[-1])]
        if (
            not flat
            or flat[0] != 0
            or flat[-1] != depth - 1
            or flat != sorted(flat)
            or any(b != a + 1 for a, b in zip(flat[1::2], flat[2::2], strict=False))
        ):
            raise ValueError(
                f"interaction_indexes={[list(part) for part in interaction_indexes]} must divide blocks 0 to {depth - 1} of depth={depth} into "
                f"parts, as [[0, {depth // 2 - 1}], [{depth // 2}, {depth - 1}]]"
            )
        freeze_vit = vit.pop("freeze_vit", False)
        super().__init__(
            patch_size=patch_size, drop_path_rate=drop_path_rate, depth=depth, out_indices=[depth - 1], **vit
        )
        self.cls_token = None
        self.vit_patch, self.patch_size = patch_size, 2 * patch_size  # the coarsest map halves the ViT's grid
        self.freeze_vit, self.out_indices, self.parts = (
            freeze_vit,
            tuple(out_indices),
            tuple((part[0], part[-1] + 1) for part in interaction_indexes),
        )
        if freeze_vit:
            self.requires_grad_(False)
        width, self.add_vit_feature = self.embed_dim, add_vit_feature
        heads = self.arguments["num_heads"] if deform_num_heads is None else deform_num_heads
        hidden = int(width * cffn_ratio) if with_cffn else None
        self.level_embed = nn.Parameter(torch.empty(3, width))
        self.spm = SpatialPrior(conv_inplane, width, finest=len(out_indices) == 4)
        self.interactions = nn.ModuleList(
            Interaction(
                width,
                heads,
                n_points,
                deform_ratio,
                hidden,
                drop_path_rate,
                init_values,
                use_extra_extractor and index == len(self.parts) - 1,
            )
            for index in range(len(self.parts))
        )
        self.up = UpConv(width) if len(out_indices) == 4 else None
        for index in out_indices if use_final_norm else ():
            setattr(self, f"norm{index + 1}", ChannelsFirstLayerNorm(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embeddings; the other modules draw their own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if hasattr(self, "level_embed"):
            nn.init.normal_(self.level_embed)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image (b, 3, h, w) -> maps (b, c, h / 4, w / 4) to (b, c, h / 32, w / 32) with patches of 16 pixels, in the dtype that the blocks compute in.

        Raises ValueError when h or w is not a multiple of twice the patch size.
        """
        if image.size(2) % self.patch_size or image.size(3) % self.patch_size:
            raise ValueError(
                f"image of {image.size(2)} x {image.size(3)} pixels is not a multiple of {self.patch_size}, twice the patch size"
            )
        finest, *maps = self.spm(image)
        shapes = [tuple(features.shape[2:]) for features in maps]
        pyramid = torch.cat(
            [
                features.flatten(2).mT + level.to(features.dtype)
                for features, level in zip(maps, self.level_embed, strict=True)
            ],
            1,
        )
        x = self.patch_embed(image)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).mT + resize_position_embedding(self.pos_embed, grid)[:, 1:].to(x.dtype)
        around_tokens, around_pixels = pixel_centres([grid], x), pixel_centres(shapes, x)
        for (first, end), interaction in zip(self.parts, self.interactions, strict=True):
            x = self._run(interaction.injector, x, around_tokens, pyramid, shapes)
            for index in range(first, end):
                x = run_block(
                    self.blocks[index],
                    x,
                    index=index,
                    recomputation=self.recomputation if self.with_cp and self.training else "none",
                )
            for extractor in interaction.extractors:
                pyramid = self._run(extractor, pyramid, around_pixels, x, grid, shapes)
        maps = [
            part.mT.unflatten(2, shape)
            for part, shape in zip(pyramid.split([h * w for h, w in shapes], 1), shapes, strict=True)
        ]
        if finest is not None:
            maps.insert(0, self.up(maps[0]) + finest)
        if self.add_vit_feature:
            seen = x.mT.unflatten(2, grid)
            maps = [
                features
                + (
                    seen
                    if features.shape == seen.shape
                    else F.interpolate(seen, features.shape[2:], mode="bilinear", align_corners=False)
                )
                for features in maps
            ]
        return tuple(
            getattr(self, f"norm{index + 1}", nn.Identity())(features).contiguous()
            for index, features in zip(self.out_indices, maps, strict=True)
        )

    def _run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """An injector or extractor, computed again in the backward pass where blocks are."""
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)
