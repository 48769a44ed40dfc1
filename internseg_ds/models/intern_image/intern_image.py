"""InternImage as a segmentation backbone, with the constructor arguments, parameter names and numbers that
OpenGVLab published.

In: images (b, 3, h, w) of any size. Out: the feature maps of chosen levels, at 1/4, 1/8, 1/16 and 1/32 of the
image. Inside, feature maps are channels last, (b, h, w, c). Letters: b images, (h, w) a size, c channels.
Knows nothing of DeepSpeed and never chooses a dtype: it computes in its input's. Every module that owns
parameters can draw its initial values again (`reset_parameters`), so that they may be built in pieces.
Source: Wang et al., "InternImage" (2022), and OpenGVLab/InternImage
`segmentation/mmseg_custom/models/backbones/intern_image.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.runner import BaseModule
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.models.intern_image.blocks import Block, BlockSettings, Level, Stem
from internseg_ds.models.weight_resizing import adapt_channels, is_image_kernel


@BACKBONES.register_module()
class InternImage(BaseModule):
    """The InternImage backbone: levels of blocks whose core is a deformable convolution (DCNv3), each level
    twice as wide as the one before.

    channels: width of the first level. depths, groups: blocks, and groups of their DCNv3, per level.
    drop_rate: dropout after the stem and in the MLPs. drop_path_type: "linear" grows from 0 to drop_path_rate
    over all blocks, "uniform" is drop_path_rate in each. act_layer: "GELU", "ReLU" or "SiLU"; norm_layer:
    "LN" or "BN", of the stem, the downsampling and inside DCNv3 (blocks have LayerNorm, eps 1e-6).
    layer_scale: start of the residual branches' scale, None for no scale. level2_post_norm: norms after the
    blocks level2_post_norm_block_ids of the third level. post_norm, res_post_norm: the order of a block's
    norms; res_post_norm, center_feature_scale and dw_kernel_size are those of InternImage-H and G.
    out_indices: levels whose feature maps are returned. frozen_stages: as in mmseg, 0 freezes the stem, n the
    stem and the first n levels, -1 nothing. with_cp: activation checkpointing of each block, or what the
    attribute `recomputation` says. init_cfg: dict(type="Pretrained", checkpoint=PATH), alone or as a list's
    only entry, names the weight file that the engine loads, None for none. pretrained: the same as a path;
    the name of an open-mmlab model, which a config inherits from the ResNet of a base config, is ignored.
    in_channels: of the images; weights of three channels are adapted at load (`weight_resizing.adapt_channels`).
    Raises ValueError for arguments that contradict each other.
    """

    follows_dtype = True
    pretrained_extras = (
        "conv_head.",
        "head.",
        "dcnv3_head_x3.",
        "dcnv3_head_x4.",
        "clip_projector.",
        "fc_norm.",
    )
    """Of published classification checkpoints."""
    layouts = ("internimage",)
    """One .pth with our names."""
    no_decay_words = ("norm", "relative_position", "sampling_offsets")
    """The last two are names of other modules of a segmentor; the published list applies to all of it."""
    resizable = {"patch_embed.conv1.weight": (is_image_kernel, adapt_channels)}
    # what these attributes mean: `Backbone` in models/backbone.py

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
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        post_norm_ids = list(level2_post_norm_block_ids or ()) if level2_post_norm else []
        _check_choice("core_op", core_op, ("DCNv3", "DCNv3_pytorch"))
        _check_choice("drop_path_type", drop_path_type, ("linear", "uniform"))
        if isinstance(in_channels, bool) or not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f"in_channels={in_channels!r} must be a whole number of at least 1")
        _check_widths(channels, depths, groups)
        if res_post_norm and (post_norm or layer_scale is not None):
            raise ValueError(
                f"res_post_norm=True goes with neither post_norm={post_norm} nor layer_scale={layer_scale}: "
                "its norms would not be used"
            )
        if level2_post_norm:
            _check_post_norm_ids(post_norm_ids, depths)
        _check_level_numbers(out_indices, frozen_stages, levels=len(depths))
        self.depths = tuple(depths)
        self.depth = sum(depths)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.recomputation: CheckpointingPolicy = "blocks"
        self.pretrained = _weight_file(init_cfg, pretrained)

        self.image_channels = in_channels
        self.patch_embed = Stem(in_channels, channels, act_layer, norm_layer)
        self.pos_drop = nn.Dropout(drop_rate)
        settings = BlockSettings(
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            act_layer=act_layer,
            norm_layer=norm_layer,
            post_norm=post_norm,
            layer_scale=layer_scale,
            offset_scale=offset_scale,
            dw_kernel_size=dw_kernel_size,
            res_post_norm=res_post_norm,
            center_feature_scale=center_feature_scale,
        )
        self.levels = nn.ModuleList()
        for level, rates in enumerate(self._drop_path_rates(drop_path_rate, drop_path_type)):
            width = channels * 2**level
            self.levels.append(
                Level(
                    [Block(width, groups[level], rate, settings) for rate in rates],
                    width,
                    norm_layer,
                    normed=not post_norm or center_feature_scale,
                    post_norm_ids=post_norm_ids if level == 2 else (),
                    downsample=level < len(depths) - 1,
                )
            )
        for part in self._frozen():
            part.requires_grad_(False)

    def _drop_path_rates(self, rate: float, kind: str) -> list[list[float]]:
        """Of each block of each level. kind: "uniform", or "linear": from 0 to `rate` over all blocks."""
        last = max(self.depth - 1, 1)
        rates = [rate if kind == "uniform" else rate * index / last for index in range(self.depth)]
        firsts = [sum(self.depths[:level]) for level in range(len(self.depths))]
        return [rates[first : first + depth] for first, depth in zip(firsts, self.depths, strict=True)]

    def _frozen(self) -> list[nn.Module]:
        """The modules that `frozen_stages` freezes."""
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, self.pos_drop, *self.levels[: self.frozen_stages]]

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], None]:
        """Our name -> keys in a published layout, of parameters and batch-norm statistics; no config.json."""
        return {name: (name,) for name in self.state_dict()}, None

    def layer_id(self, name: str) -> int:
        """The layer of a parameter, for layer-wise learning-rate decay; name is relative to the backbone.

        0: stem; n + 1: block n of the whole backbone, and norm n of the third level's `post_norms` counted
        from the level's first block; a level's norm and downsampling: the first block of the next level,
        those of the last level its own first.
        """
        if not name.startswith("levels."):
            return 0 if name.startswith("patch_embed.") else self.depth + 1
        _, level, part, index, *_ = name.split(".")
        if part in ("downsample", "norm"):
            return 1 + sum(self.depths[: min(int(level) + 1, len(self.depths) - 1)])
        return 1 + sum(self.depths[: int(level)]) + int(index)

    def is_offset(self, name: str) -> bool:
        """Whether `offset_lr_scale` scales the learning rate of a parameter: those of the sampling offsets.

        (The published code looks for a name that only attention has, and scales nothing here; all published
        configs have 1.0.)
        """
        return ".dcn.offset." in name

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image: (b, in_channels, h, w) -> one map (b, channels * 2**level, h', w') per level in out_indices, in the
        dtype of the image; h' is h halved 2 + level times, each time rounded up, and w' likewise."""
        x = self.pos_drop(self.patch_embed(image))
        recomputation = self.recomputation if self.with_cp and self.training else "none"
        maps: list[Tensor] = []
        # no output depends on the levels behind the last of out_indices
        levels: list[Any] = list(self.levels)[: self.out_indices[-1] + 1]
        for index, level in enumerate(levels):
            x = level(x, first=sum(self.depths[:index]), recomputation=recomputation)
            if index in self.out_indices:
                maps.append(x.permute(0, 3, 1, 2).contiguous())  # (b, h, w, c) -> (b, c, h, w)
            if index < self.out_indices[-1] and level.downsample is not None:
                x = level.downsample(x)
        return tuple(maps)

    def train(self, mode: bool = True) -> "InternImage":
        """As nn.Module's, but frozen stages stay in eval mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self


def _weight_file(
    init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, pretrained: str | None
) -> str | None:
    """The checkpoint of init_cfg, or `pretrained` where that names a file. Raises ValueError where both
    do, and for another init_cfg than mmcv's Pretrained."""
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
            f"init_cfg={init_cfg} is not dict(type='Pretrained', checkpoint=PATH), and nothing else "
            "initialises an InternImage"
        )
    checkpoint = checkpoint_of(entries)
    if pretrained is not None and checkpoint is not None:
        raise ValueError(
            f"init_cfg.checkpoint={checkpoint!r} and pretrained={pretrained!r} both name a weight file; "
            "drop one"
        )
    return pretrained if checkpoint is None else checkpoint


def _check_choice(name: str, value: str, choices: tuple[str, str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is neither {choices[0]!r} nor {choices[1]!r}")


def _check_widths(channels: int, depths: Sequence[int], groups: Sequence[int]) -> None:
    """Raise ValueError where a level has no block, or its groups do not divide its channels."""
    if channels < 2 or channels % 2:
        raise ValueError(f"channels={channels} must be even: the stem's first convolution has half of them")
    if not depths or len(groups) != len(depths) or min(depths) < 1:
        raise ValueError(
            f"depths={list(depths)} and groups={list(groups)} must have one number of at least 1 for each "
            "level"
        )
    for level, count in enumerate(groups):
        width = channels * 2**level
        if count < 1 or width % count:
            raise ValueError(
                f"groups[{level}]={count} does not divide the {width} channels of level "
                f"{level} (channels={channels})"
            )


def _check_post_norm_ids(ids: list[int], depths: Sequence[int]) -> None:
    """Raise ValueError unless `ids` name blocks of the third level, at least one."""
    if len(depths) < 3 or not ids or not _ascending_below(ids, depths[2]):
        raise ValueError(
            "level2_post_norm=True needs level2_post_norm_block_ids that name blocks of the third level "
            f"of depths={list(depths)}, ascending, not {ids}"
        )


def _check_level_numbers(out_indices: Sequence[int], frozen_stages: int, levels: int) -> None:
    if not out_indices or not _ascending_below(out_indices, levels):
        raise ValueError(f"out_indices={list(out_indices)} must name levels 0 to {levels - 1}, ascending")
    if not -1 <= frozen_stages <= levels:
        raise ValueError(
            f"frozen_stages={frozen_stages} must be -1 (nothing) to {levels} (the stem and all {levels} "
            "levels)"
        )


def _ascending_below(numbers: Sequence[int], limit: int) -> bool:
    """Whether the numbers are different, ascending, and from 0 to limit - 1."""
    return list(numbers) == sorted(set(numbers)) and all(0 <= number < limit for number in numbers)
