"""InternImage as a segmentation backbone, with the constructor arguments, parameter names and numbers that OpenGVLab published.

In: images (b, 3, h, w) of any size. Out: the feature maps of chosen levels, at 1/4, 1/8, 1/16 and 1/32 of the image. Inside, feature maps are channels last,
(b, h, w, c). Knows nothing of DeepSpeed and never chooses a dtype: it follows its input's. Every module that owns parameters can draw them anew.
Source: Wang et al., "InternImage" (2022), and OpenGVLab/InternImage `segmentation/mmseg_custom/models/backbones/intern_image.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.runner import BaseModule
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.models.intern_image_blocks import Block, Level, Stem
from internseg_ds.models.recomputation import Recomputation


@BACKBONES.register_module()
class InternImage(BaseModule):
    """The InternImage backbone: levels of blocks whose core is a deformable convolution (DCNv3), each level twice as wide as the one before.

    channels: width of the first level. depths, groups: blocks, and groups of their DCNv3, per level. drop_rate: dropout after the stem and in the MLPs.
    drop_path_type: "linear" grows from 0 to drop_path_rate over all blocks, "uniform" is drop_path_rate in each. act_layer: "GELU", "ReLU" or "SiLU";
    norm_layer: "LN" or "BN", of the stem, the downsampling and inside DCNv3 (blocks have LayerNorm, eps 1e-6). layer_scale: start of the residual branches'
    scale, None for no scale. level2_post_norm: norms after the blocks level2_post_norm_block_ids of the third level. post_norm, res_post_norm: the order of a
    block's norms; res_post_norm, center_feature_scale and dw_kernel_size are those of InternImage-H and G. out_indices: levels whose feature maps go out.
    frozen_stages: as in mmseg, 0 freezes the stem, n the stem and the first n levels, -1 nothing. with_cp: recompute each block in the backward pass, or what
    the attribute `recomputation` says. init_cfg: dict(type="Pretrained", checkpoint=PATH), alone or as a list's only entry, names the weight file that the
    engine loads, None for none. pretrained: the same as a path; the name of an open-mmlab model, which mmseg hands down from the ResNet of a base config, is
    passed over. Raises ValueError for arguments that do not fit each other.
    """

    follows_dtype = True
    """It computes in the dtype of its input, whatever that is."""
    pretrained_extras = (
        "conv_head.",
        "head.",
        "dcnv3_head_x3.",
        "dcnv3_head_x4.",
        "clip_projector.",
        "fc_norm.",
    )
    """Prefixes of what published classification checkpoints hold beside the backbone."""
    layouts = ("internimage",)
    """Layouts that it can be exported in: the one .pth, whose names are ours."""
    no_decay_words = ("norm", "relative_position", "sampling_offsets")
    """Parameters of the segmentor whose names hold one of these get no weight decay under the layer-wise learning-rate decay."""

    def __init__(
        self,
        core_op: str = "DCNv3",
        channels: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        groups: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        drop_path_type: str = "linear",
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        with_cp: bool = False,
        dw_kernel_size: int | None = None,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        res_post_norm: bool = False,
        center_feature_scale: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        post_norm_ids = list(level2_post_norm_block_ids or ()) if level2_post_norm else []
        _check(
            core_op,
            channels,
            depths,
            groups,
            drop_path_type,
            layer_scale,
            post_norm,
            res_post_norm,
            level2_post_norm,
            post_norm_ids,
            out_indices,
            frozen_stages,
        )
        self.depths, self.depth = tuple(depths), sum(depths)
        self.out_indices, self.frozen_stages, self.with_cp = tuple(out_indices), frozen_stages, with_cp
        self.recomputation: Recomputation = "blocks"
        self.pretrained = _weight_file(init_cfg, pretrained)

        self.patch_embed = Stem(channels, act_layer, norm_layer)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = [
            drop_path_rate if drop_path_type == "uniform" else drop_path_rate * index / max(self.depth - 1, 1)
            for index in range(self.depth)
        ]
        self.levels = nn.ModuleList()
        for level, depth in enumerate(depths):
            width, first = channels * 2**level, sum(depths[:level])
            blocks = [
                Block(
                    width,
                    groups[level],
                    mlp_ratio,
                    drop_rate,
                    rate,
                    act_layer,
                    norm_layer,
                    post_norm,
                    layer_scale,
                    offset_scale,
                    dw_kernel_size,
                    res_post_norm,
                    center_feature_scale,
                )
                for rate in rates[first : first + depth]
            ]
            self.levels.append(
                Level(
                    blocks,
                    width,
                    norm_layer,
                    normed=not post_norm or center_feature_scale,
                    post_norm_ids=post_norm_ids if level == 2 else (),
                    downsample=level < len(depths) - 1,
                )
            )
        for part in self._frozen():
            part.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        return (
            []
            if self.frozen_stages < 0
            else [self.patch_embed, self.pos_drop, *self.levels[: self.frozen_stages]]
        )

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], None]:
        """Names of its parameters and statistics in a published layout; there is no config.json."""
        return {name: (name,) for name in self.state_dict()}, None

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning-rate decay; name is relative to the backbone.

        0: stem; n + 1: block n of the whole backbone, and norm n of the third level's `post_norms` counted from the level's first block; a level's norm and
        downsampling: the first block of the next level, those of the last level its own first.
        """
        if not name.startswith("levels."):
            return 0 if name.startswith("patch_embed.") else self.depth + 1
        _, level, part, index, *_ = name.split(".")
        if part in ("downsample", "norm"):
            return 1 + sum(self.depths[: min(int(level) + 1, len(self.depths) - 1)])
        return 1 + sum(self.depths[: int(level)]) + int(index)

    def is_offset(self, name: str) -> bool:
        """Whether a parameter makes sampling offsets, whose learning rate `offset_lr_scale` scales. (The published code looks for names that only attention
        has, and scales nothing here; all published configs say 1.0.)"""
        return ".dcn.offset." in name

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image (b, 3, h, w) -> one map (b, channels * 2**level, h', w') per out_index, where h' is h halved 2 + level times, rounding up."""
        x = self.pos_drop(self.patch_embed(image))
        recomputation = self.recomputation if self.with_cp and self.training else "none"
        maps: list[Tensor] = []
        for index, level in zip(
            range(self.out_indices[-1] + 1), self.levels
        ):  # no output depends on the levels after these
            x = level(x, first=sum(self.depths[:index]), recomputation=recomputation)
            if index in self.out_indices:
                maps.append(x.permute(0, 3, 1, 2).contiguous())  # (b, h, w, c) -> (b, c, h, w)
            if index < self.out_indices[-1]:
                x = level.downsample(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> "InternImage":
        """Frozen stages stay in eval mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self


def _weight_file(
    init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, pretrained: str | None
) -> str | None:
    """The checkpoint of init_cfg, or `pretrained` where that names a file."""
    if pretrained is not None and str(pretrained).startswith("open-mmlab://"):
        pretrained = None
    if init_cfg is None:
        return pretrained
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg)
    if (
        len(entries) != 1
        or entries[0].get("type") != "Pretrained"
        or set(entries[0]) != {"type", "checkpoint"}
    ):
        raise ValueError(
            f"init_cfg={init_cfg} is not dict(type='Pretrained', checkpoint=PATH), and nothing else initialises an InternImage"
        )
    checkpoint = checkpoint_of(entries)
    if pretrained is not None and checkpoint is not None:
        raise ValueError(
            f"init_cfg.checkpoint={checkpoint!r} and pretrained={pretrained!r} both name a weight file; drop one"
        )
    return pretrained if checkpoint is None else checkpoint


def _check(
    core_op: str,
    channels: int,
    depths: Sequence[int],
    groups: Sequence[int],
    drop_path_type: str,
    layer_scale: float | None,
    post_norm: bool,
    res_post_norm: bool,
    level2_post_norm: bool,
    post_norm_ids: Sequence[int],
    out_indices: Sequence[int],
    frozen_stages: int,
) -> None:
    """Raises ValueError for arguments that do not fit each other."""
    levels = len(depths)
    if core_op not in ("DCNv3", "DCNv3_pytorch"):
        raise ValueError(f"core_op={core_op!r} is neither 'DCNv3' nor 'DCNv3_pytorch'")
    if drop_path_type not in ("linear", "uniform"):
        raise ValueError(f"drop_path_type={drop_path_type!r} is neither 'linear' nor 'uniform'")
    if channels < 2 or channels % 2:
        raise ValueError(f"channels={channels} must be even: the stem's first convolution has half of them")
    if not levels or len(groups) != levels or min(depths) < 1:
        raise ValueError(
            f"depths={list(depths)} and groups={list(groups)} must have one number of at least 1 for each level"
        )
    for level, count in enumerate(groups):
        if count < 1 or channels * 2**level % count:
            raise ValueError(
                f"groups[{level}]={count} does not divide the {channels * 2**level} channels of level {level} (channels={channels})"
            )
    if res_post_norm and (post_norm or layer_scale is not None):
        raise ValueError(
            f"res_post_norm=True goes with neither post_norm={post_norm} nor layer_scale={layer_scale}: its norms would not be used"
        )
    ascending = bool(post_norm_ids) and sorted(set(post_norm_ids)) == post_norm_ids
    if level2_post_norm and (
        levels < 3 or not ascending or not 0 <= post_norm_ids[0] <= post_norm_ids[-1] < depths[2]
    ):
        raise ValueError(
            f"level2_post_norm=True needs level2_post_norm_block_ids that name blocks of the third level of depths={list(depths)}, ascending, "
            f"not {post_norm_ids}"
        )
    if (
        not out_indices
        or not all(0 <= index < levels for index in out_indices)
        or list(out_indices) != sorted(set(out_indices))
    ):
        raise ValueError(f"out_indices={list(out_indices)} must name levels 0 to {levels - 1}, ascending")
    if not -1 <= frozen_stages <= levels:
        raise ValueError(
            f"frozen_stages={frozen_stages} must be -1 (nothing) to {levels} (the stem and all {levels} levels)"
        )
