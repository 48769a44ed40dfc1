"""Any vision backbone of timm as an mmseg backbone: DINOv3, DINOv2, Sapiens2, PE-spatial, SigLIP2, AIMv2, EVA-02,
C-RADIO, ConvNeXt, Swin and others.

In: images (b, 3, h, w). Out: feature maps of chosen blocks (plain transformers) or stages (hierarchical
models). The classes are timm's own, as `timm.create_model` builds them; here stands what the engine wants of
a backbone beside its forward pass. Letters: b images, (h, w) a size, n tokens, c channels.
"""

import difflib
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.errors import reason_of
from internseg_ds.models.adapters.library_backbone import LibraryBackbone, chosen_maps, reset_modules
from internseg_ds.models.adapters.pretraining_images import timm_normalizations
from internseg_ds.models.adapters.transformers_configs import timm_model_of
from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.models.eomt.joined_queries import Attended, Stages, Tokens, with_queries
from internseg_ds.models.layers import DropPath
from internseg_ds.models.weight_resizing import (
    adapt_channels,
    is_image_kernel,
    is_patch_kernel,
    is_square_embedding,
)
from internseg_ds.torch_internals import persistent_buffers

ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},  # ViT, EVA: position embeddings follow each image
    {"strict_img_size": False, "dynamic_mask": True},  # Swin: the masks of shifted windows do
    {"strict_img_size": False},
    {},  # convolutions
)
"""Arguments by which timm's models take images of other sizes than `img_size`; the first that a model has."""
OWN = {
    "num_classes": "maps are taken before the classifier",
    "features_only": "feature maps are had by out_indices",
    "pretrained": "nothing is downloaded; write pretrained=PATH beside model_args",
    "checkpoint_path": "write pretrained=PATH beside model_args",
}
"""Arguments of `timm.create_model` that no config can give, and why."""
READS_VALUES = "cannot be called on meta tensors"
"""What torch says of a forward pass that reads values."""
LAYOUTS = (
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"),
    ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "fc_norm.weight"),
    ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight", "norm.weight"),  # Swin
    ("stem.0.weight", "stages.0.blocks.0.norm.weight"),  # ConvNeXt
)
"""Keys that weight files of timm have together, one line for each kind. InternVL's .pth has no last norm."""


@BACKBONES.register_module()
class TimmBackbone(LibraryBackbone):
    """A timm model without its classifier, and without the blocks behind the last of `out_indices`.

    model_name: a name of `timm.list_models()`. out_indices: blocks, or stages of hierarchical models, whose
    outputs become feature maps; default the ends of the four quarters, or all stages. img_size: side of the
    images, or (height, width), that position embeddings are made for; other sizes are resized to in the
    forward pass. final_norm: feature maps pass the model's last norm, as in pretraining. with_cp: activation
    checkpointing of each block, or what the attribute `recomputation` says. freeze: nothing of timm's model
    trains, nothing is dropped, and no graph is kept. neck: an mmseg neck, by its config or the name of its
    class, that computes with the backbone, in its dtype; its in_channels are filled in. pretrained (or mmcv's
    init_cfg): weight file or folder in timm's layout that the engine loads. model_args: further arguments of
    the model's class; in_chans, for images of so many channels, is one of them.

    Raises ValueError for a name that timm does not have, blocks that the model does not have, and models
    that give no intermediate feature maps.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] | None = None,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        final_norm: bool = False,
        with_cp: bool = False,
        freeze: bool = False,
        neck: Mapping[str, Any] | str | None = None,
        pretrained: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        DropPath(drop_path_rate)  # raises for what is no probability
        arguments = dict(model_args or {})
        for name, value in (("img_size", img_size), ("drop_path_rate", drop_path_rate)):
            if value and arguments.get(name, value) != value:
                raise ValueError(
                    f"{name}={value!r}, but model_args has {name}={arguments[name]!r}; write it once"
                )
        if img_size is not None:
            arguments["img_size"] = img_size
        model: Any
        model, built_with = _create(model_name, arguments, drop_path_rate)
        model = _with_sync_batch_norm(model)
        whole = {name for name, _ in model.named_parameters()}
        chosen = _prune(model, model_name, out_indices, final_norm)
        kept = {name for name, _ in model.named_parameters()}
        channels = [model.feature_info[index]["num_chs"] for index in chosen]
        super().__init__(
            model,
            channels,
            with_cp=with_cp,
            freeze=freeze,
            neck=neck,
            pretrained=pretrained,
            init_cfg=init_cfg,
        )
        self.model_name = model_name
        self.model_args = arguments
        self.built_with = built_with
        """Arguments of `timm.create_model`, without drop path."""
        self.out_indices = chosen
        self.final_norm = final_norm

        # what these attributes mean: `Backbone` in models/backbone.py
        self.normalizations = timm_normalizations(model_name, pretrained or checkpoint_of(init_cfg))
        self.left_out = self.pretrained_extras = tuple(sorted(whole - kept))
        self.patch_size: int | tuple[int, int] = 1  # hierarchical models round the sizes of their maps
        if self._is_plain():
            self.patch_size = self.model.patch_embed.feat_ratio(as_scalar=False)
        self.follows_dtype = self._is_plain()
        self._layer_ids = _layer_ids(self.model)
        self.depth = max(self._layer_ids.values(), default=0)
        self.no_decay_words: tuple[str, ...] = tuple(sorted(getattr(self.model, "no_weight_decay", set)()))
        self.resizable = _resizable(self.model)
        self.image_channels: int = (
            arguments.get("in_chans") or model.pretrained_cfg.get("input_size", (3,))[0]
        )
        self.num_blocks = _blocks_that_take_masks(self.model)
        self.num_prefix_tokens = getattr(self.model, "num_prefix_tokens", 0)

    def _is_plain(self) -> bool:
        """Whether it is a plain transformer by timm's own layers: one width, one grid, tokens from end to
        end."""
        return hasattr(getattr(self.model, "patch_embed", None), "feat_ratio") and isinstance(
            getattr(self.model, "blocks", None), nn.Module
        )

    def initial_values(self) -> None:
        """Draw the initial values as timm's class does; where it has no method for that, those of each module
        by itself (torch's, and what constructors set)."""
        init_weights = getattr(self.model, "init_weights", None)
        if init_weights is not None and "needs_reset" in inspect.signature(init_weights).parameters:
            init_weights(needs_reset=True)
        else:
            reset_modules(self.model)
        if self.neck is not None:
            reset_modules(self.neck)

    def published_sources(self, names: Collection[str]) -> tuple[str, dict[str, tuple[str, ...]]] | None:
        """Where a file in timm's layout has each of our parameters; None for a file in another."""
        own: list[str] = [name for name, _ in self.model.named_parameters()]
        own += [name for name, _ in self.model.named_buffers()]
        found: dict[str, tuple[str, ...]] = {f"model.{name}": (name,) for name in own if name in names}
        return ("", found) if found else None

    @staticmethod
    def recognises(names: Collection[str], config: Mapping[str, Any] | None) -> str | None:
        """How a config names this backbone for a file in timm's layout."""
        if config is not None and (name := timm_model_of(config)) is not None:
            return f'type="TimmBackbone", model_name="{name}"'
        found = any(set(marks) <= set(names) for marks in LAYOUTS)
        return 'type="TimmBackbone", model_name=NAME' if found else None

    channels_setting = "model_args.in_chans"
    layouts: tuple[str, ...] = ("timm",)

    def exported(self, layout: str) -> tuple[dict[str, tuple[str, ...]], dict[str, Any] | None]:
        """Our name -> timm's name of each parameter and buffer in timm's files, which have no config.json of
        their own."""
        names = [name for name, _ in self.model.named_parameters()]
        names += sorted(persistent_buffers(self.model))
        return {f"model.{name}": (name,) for name in names}, None

    def layer_id(self, name: str) -> int:
        """The layer of a parameter as timm groups them (`group_matcher`): 0 is what stands before the blocks,
        depth + 1 the neck. Raises ValueError for a model that timm does not group."""
        if not self._layer_ids:
            raise ValueError(
                f"timm has no layers of {type(self.model).__name__}; use one learning rate for all of it"
            )
        return self.depth + 1 if name.startswith("neck.") else self._layer_ids[name.removeprefix("model.")]

    def feature_maps(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h / s, w / s) for each of out_indices, s its stride.

        Raises ValueError for an image without values, as the checks before a run have it, of a size that the
        model cannot take.
        """
        try:
            return self._maps_of(image)
        except (AssertionError, RuntimeError, ValueError) as error:
            if not image.is_meta:
                raise
            if READS_VALUES in str(error):
                raise NotImplementedError(
                    f"timm's {self.model_name} reads values of tensors in its forward pass"
                ) from error
            raise self._refused(image, error) from error

    def _maps_of(self, image: Tensor) -> Sequence[Tensor]:
        return self.model.forward_intermediates(
            image,
            indices=list(self.out_indices),
            norm=self.final_norm,
            output_fmt="NCHW",
            intermediates_only=True,
        )

    def _refused(self, image: Tensor, error: Exception) -> ValueError:
        """Why no maps can be had of an image, which is on the meta device: its size, or the model itself, where
        it refuses one of the size that it was made for, too."""
        reason = " ".join(str(error).split())[:160]
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        own = size if isinstance(size, (list, tuple)) and len(size) == 2 else None
        own = own or tuple(self.model.pretrained_cfg.get("input_size", ()))[1:]
        if len(own) == 2:
            try:
                self._maps_of(image.new_empty(1, self.image_channels, *own))
            except (AssertionError, RuntimeError, ValueError):
                return ValueError(
                    f"timm's {self.model_name} gives no feature maps with final_norm={self.final_norm} and "
                    f"model_args={self.model_args}, not even of images of its own size, {own[0]} x {own[1]}: {reason}"
                )
        return ValueError(
            f"timm's {self.model_name} cannot take images of {image.size(2)} x {image.size(3)} ({reason}); it was "
            f"made for {' x '.join(map(str, own)) or 'others'}: train and test in such crops, or write "
            "img_size=(HEIGHT, WIDTH) of yours where its class has that argument"
        )

    def query_stages(
        self, image: Tensor, queries: Tensor, last_blocks: int, attended: Attended | None
    ) -> Stages:
        """As of `with_queries`, of timm's blocks one by one."""
        return with_queries(self, image, queries, last_blocks, attended)

    def tokens(self, image: Tensor) -> Tokens:
        """As of `QueryBackbone`. The context is the table of rotary positions, of each block where they
        differ, or None."""
        patches = self.model.patch_embed(image)
        positioned = self.model._pos_embed(patches)  # timm has no public name for it
        values, rope = positioned if isinstance(positioned, tuple) else (positioned, None)
        height, width = image.shape[-2:]
        return Tokens(
            self.model.norm_pre(values), self.model.patch_embed.dynamic_feat_size((height, width)), rope
        )

    def run_block(self, index: int, values: Tensor, context: Any, mask: Tensor | None = None) -> Tensor:
        """As of `QueryBackbone`."""
        block = self.model.blocks[index]
        if context is None:
            return block(values, attn_mask=mask)
        rope = context[index] if getattr(self.model, "rope_mixed", False) else context
        return block(values, rope=_unturned(rope, values.size(1) - self.num_prefix_tokens), attn_mask=mask)

    def last_norm(self, values: Tensor) -> Tensor:
        """As of `QueryBackbone`."""
        return self.model.norm(values)


def _blocks_that_take_masks(model: Any) -> int:
    """The number of blocks of a plain transformer whose tokens can be embedded and passed through them one by
    one, with a mask for the attention of each; 0 for other models."""
    if not all(hasattr(model, name) for name in ("patch_embed", "_pos_embed", "norm_pre", "norm", "blocks")):
        return 0
    takes_masks = all(
        "attn_mask" in inspect.signature(type(block).forward).parameters for block in model.blocks
    )
    return len(model.blocks) if takes_masks else 0


def _unturned(rope: Tensor, positions: int) -> Tensor:
    """A table of rotary positions with rows for more tokens in front, which are not turned: the angle 0.

    rope: (..., n, 2 d), sines and then cosines, as timm has them -> (..., positions, 2 d).
    """
    more = positions - rope.size(-2)
    if not more:
        return rope
    sines = rope.new_zeros(*rope.shape[:-2], more, rope.size(-1) // 2)
    return torch.cat((torch.cat((sines, torch.ones_like(sines)), dim=-1), rope), dim=-2)


def _create(
    model_name: str, arguments: Mapping[str, Any], drop_path_rate: float
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model without a classifier, for images of any size where its class can be, and the arguments that it
    was built with, but for drop path. Raises ValueError for a name that timm does not have, and for a drop-path rate
    of a model that has none."""
    import timm  # here: it takes a second, and most runs have no model of it

    architecture = model_name.partition(".")[0]
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"timm {timm.__version__} has no model {model_name!r}"
            + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "; see timm.list_models()")
        )
    for name, why in OWN.items():
        if name in arguments:
            raise ValueError(f"model_args has {name!r}, which is not for configs: {why}")
    try:
        return _created(model_name, arguments, drop_path_rate)
    except (ImportError, NotImplementedError):
        raise
    except Exception as error:  # timm's classes check their arguments each in its own way
        if not arguments or str(error).startswith("drop_path_rate="):
            raise
        raise _not_built(model_name, arguments, error) from error


def _created(
    model_name: str, arguments: Mapping[str, Any], drop_path_rate: float
) -> tuple[nn.Module, dict[str, Any]]:
    import timm

    optional = {"drop_path_rate": drop_path_rate}
    for any_size in ANY_SIZE:
        for more in (optional, {}):
            try:
                given = {**any_size, **arguments}
                return timm.create_model(model_name, num_classes=0, **{**more, **given}), given
            except TypeError as error:
                if more and "'drop_path_rate'" in str(error) and "drop_path_rate" not in arguments:
                    if drop_path_rate:
                        raise ValueError(
                            f"drop_path_rate={drop_path_rate:g}, but timm's {model_name} has none"
                        ) from None
                elif any(f"'{name}'" in str(error) and name not in arguments for name in any_size):
                    break
                else:
                    raise
    raise AssertionError("the last of ANY_SIZE is empty")


def _with_sync_batch_norm(model: nn.Module) -> nn.Module:
    """With batch norms over the images of all processes, as in mmseg's recipes: the few images of one are no
    sample."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def _not_built(model_name: str, arguments: Mapping[str, Any], error: Exception) -> ValueError:
    """The error for arguments that timm's class refuses: one that it does not have, or values that do not fit."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None or found[1] not in arguments:
        return ValueError(
            f"timm's {model_name} cannot be built with model_args={dict(arguments)}: {reason_of(error)[:160]}"
        )
    if found[1] == "img_size":
        return ValueError(f"img_size={arguments['img_size']!r}, but timm's {model_name} has none; drop it")
    with torch.device("meta"):
        kind = type(_created(model_name, {}, 0.0)[0])
    known = [
        name
        for base in kind.__mro__
        for name in inspect.signature(vars(base).get("__init__", object.__init__)).parameters
    ]
    near = difflib.get_close_matches(found[1], known, n=1)
    return ValueError(
        f"model_args has {found[1]!r}, which timm's {model_name} does not have"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _prune(
    model: Any, model_name: str, out_indices: Sequence[int] | None, final_norm: bool
) -> tuple[int, ...]:
    """Removes what no feature map depends on; the indices of the feature maps."""
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "prune_intermediate_layers"):
        raise ValueError(f"timm's {model_name} gives no intermediate feature maps")
    count = len(model.feature_info)
    chosen = chosen_maps(out_indices, count, f"timm's {model_name}")
    if final_norm and isinstance(getattr(model, "norm", nn.Identity()), nn.Identity):
        raise ValueError(f"final_norm=True, but timm's {model_name} has no last norm; drop it")
    if not all("num_chs" in (model.feature_info[index] or {}) for index in chosen):
        raise ValueError(f"timm's {model_name} does not say how many channels its feature maps have")
    model.prune_intermediate_layers(list(chosen), prune_norm=not final_norm, prune_head=True)
    return chosen


def _layer_ids(model: Any) -> dict[str, int]:
    """The layer of each parameter, from 0, as timm's layer-wise learning-rate decay has it; empty where timm
    has no groups of a model."""
    from timm.models import group_parameters

    if not hasattr(model, "group_matcher"):
        return {}

    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def _resizable(model: Any) -> dict[str, tuple[Any, Any]]:
    """Position embedding and patch kernel, which timm's own functions resize at load."""
    found: dict[str, tuple[Any, Any]] = {}
    pos_embed = getattr(model, "pos_embed", None)
    if isinstance(pos_embed, nn.Parameter) and hasattr(model, "num_prefix_tokens"):
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        grid = tuple(model.patch_embed.grid_size)
        found["model.pos_embed"] = (
            partial(is_square_embedding, prefix=prefix),
            partial(_resize_embedding, grid=grid, prefix=prefix),
        )
    if isinstance(getattr(getattr(model, "patch_embed", None), "proj", None), nn.Conv2d):
        found["model.patch_embed.proj.weight"] = (is_patch_kernel, _resize_kernel)
    first = model.pretrained_cfg.get("first_conv") or ()
    for name in [first] if isinstance(first, str) else first:
        found.setdefault(f"model.{name}.weight", (is_image_kernel, adapt_channels))
    return found


def _resize_embedding(pos_embed: Tensor, shape: torch.Size, grid: tuple[int, int], prefix: int) -> Tensor:
    """pos_embed: (1, prefix + s * s, c) -> `shape` (1, prefix + h * w, c) with (h, w) = grid."""
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(pos_embed, list(grid), num_prefix_tokens=prefix).view(shape)


def _resize_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    """kernel: (c, i, p, p) -> `shape` (c, j, q, q), so that a resized image gives the same tokens (Beyer et al.,
    FlexiViT, 2023, section 3.4), and for other channels by `adapt_channels`."""
    from timm.layers import resample_patch_embed

    kernel = adapt_channels(kernel, shape)
    return kernel if kernel.shape == shape else resample_patch_embed(kernel, list(shape[2:]))
