"""Any vision backbone of transformers as an mmseg backbone: DINOv3, DINOv2, InternViT, SigLIP, SigLIP2, AIMv2,
RADIO, CLIP, ViT, Swin, ConvNeXt and others.

In: images (b, 3, h, w). Out: feature maps of chosen blocks (plain transformers) or stages (hierarchical
models). The classes are transformers' own; here stands what the engine wants of a backbone beside its forward
pass. Nothing is downloaded, and no code of a model's folder is run. Letters: b images, (h, w) a size, n tokens,
c channels, p the side of a patch.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.models.adapters.library_backbone import LibraryBackbone, reset_modules
from internseg_ds.models.adapters.pretraining_images import transformers_normalizations
from internseg_ds.models.adapters.transformers_configs import MAPS, vision_config
from internseg_ds.models.adapters.transformers_keys import places, published_keys, sources
from internseg_ds.models.adapters.transformers_models import build, draw_values
from internseg_ds.models.adapters.transformers_parts import names_of
from internseg_ds.models.adapters.transformers_plain import HEADS, PlainModel
from internseg_ds.models.adapters.transformers_staged import StagedModel
from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.models.eomt.joined_queries import Attended, Stages
from internseg_ds.models.weight_resizing import (
    adapt_channels,
    is_image_kernel,
    is_patch_kernel,
    is_square_embedding,
    resize_patch_kernel,
    resize_position_embedding,
)
from internseg_ds.tensor_part import Part
from internseg_ds.torch_internals import persistent_buffers

NO_DECAY = ("cls_token", "cls_register_token", "position_embedding", "register_tokens", "relative_position")
"""Words in the names of tokens and position embeddings, which get no weight decay."""
UNSEEN = (
    "hidden_act",
    "is_native",
    "layer_norm_eps",
    "norm_type",
    "num_attention_heads",
    "rms_norm_eps",
    "rope_theta",
    "use_mean_pooling",
    "window_size",
)
"""Fields of a configuration that change features and not the shape of any weight."""


@BACKBONES.register_module()
class TransformersBackbone(LibraryBackbone):
    """A vision model of transformers without its pooling head and the blocks behind the last of `out_indices`.

    config: the folder of its config.json, or its fields: dict(model_type="dinov3_vit", hidden_size=...), what is
    missing having transformers' default; without model_type, fields that replace those of the folder
    `pretrained` (image_size: what position embeddings are resized to at load; num_channels: of the images). Not
    needed beside `pretrained`.
    out_indices: blocks, or stages of hierarchical models, whose outputs become feature maps; default the ends of
    the four quarters, or all stages. drop_path_rate: grows linearly to it; a rate in config.json does not count.
    final_norm: feature maps of a plain transformer pass its last norm, as in pretraining. with_cp: activation
    checkpointing of each block, or what the attribute `recomputation` says. freeze: nothing of the model trains,
    nothing is dropped, and no graph is kept. neck: an mmseg neck, by its config or the name of its class, that
    computes with the backbone, in its dtype; its in_channels are filled in. pretrained (or mmcv's init_cfg):
    folder in transformers' layout, of the vision model or of a larger model that has it, which the engine loads.

    Raises ValueError for what transformers does not have, and for folders that are not there.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | str | None = None,
        out_indices: Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        final_norm: bool = False,
        with_cp: bool = False,
        freeze: bool = False,
        neck: Mapping[str, Any] | str | None = None,
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        found = vision_config(config, pretrained or checkpoint_of(init_cfg))
        published: dict[str, Any] = json.loads(found.to_json_string())
        kind = build(found, out_indices, drop_path_rate, final_norm=final_norm)
        # over the images of all processes, as in mmseg's recipes: the few images of one are no sample
        nn.SyncBatchNorm.convert_sync_batchnorm(kind.model)
        super().__init__(
            kind.model,
            kind.channels,
            with_cp=with_cp,
            freeze=freeze,
            neck=neck,
            pretrained=pretrained,
            init_cfg=init_cfg,
        )
        self._kind = kind
        self._published = published
        self.out_indices = kind.chosen
        self.final_norm = final_norm

        # what these attributes mean: `Backbone` in models/backbone.py
        self.patch_size: int | tuple[int, int] = 1  # hierarchical models round the sizes of their maps
        self.num_blocks = 0
        if isinstance(kind, PlainModel):
            self.num_blocks = kind.layers if kind.takes_masks() else 0
            kind.watch_blocks()
            self.patch_size = kind.patch
        self.follows_dtype = isinstance(kind, PlainModel)
        self._layer_ids = kind.layer_ids()
        self.depth = kind.layers
        kept = {name for name, _ in self.model.named_parameters()} | persistent_buffers(self.model)
        self.normalizations = transformers_normalizations(pretrained or checkpoint_of(init_cfg))
        self.left_out = tuple(name for name in kind.whole if name not in names_of(self.model))
        self.pretrained_extras: tuple[str, ...] = tuple(f"model.{n}" for n in kind.whole if n not in kept)
        self.arguments: dict[str, Any] = {
            f"config.{name}": getattr(found, name) for name in UNSEEN if hasattr(found, name)
        }
        self.stated: dict[str, Any] = {"config": published}
        self.resizable = _resizable(kind) if isinstance(kind, PlainModel) else _image_kernel(kind)
        self.image_channels: int = getattr(found, "num_channels", 3)
        params = list(self.model.parameters())
        if not any(param.is_meta for param in params) and any(param.numel() for param in params):
            self.initial_values()  # whole; the engine draws those of partitioned parameters itself

    no_decay_words: tuple[str, ...] = NO_DECAY
    not_pretrained: tuple[str, ...] = ("neck.", f"model.{StagedModel.norms}.")
    layouts: tuple[str, ...] = ("transformers",)

    def initial_values(self) -> None:
        """Draw the initial values as transformers' class does, and those of the neck as its modules do."""
        draw_values(self.model)
        if self.neck is not None:
            reset_modules(self.neck)

    def published_sources(
        self, names: Collection[str]
    ) -> tuple[str, dict[str, tuple[str | Part, ...]]] | None:
        """Where a file in transformers' layout has each of our parameters, and those that were left out; None
        for a file in another."""
        prefix, found = sources(self.model, self._kind.whole, names)
        return (prefix, {f"model.{name}": place for name, place in found.items()}) if found else None

    def arguments_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json that do not show in shapes, those of its `vision_config` where it has
        one; none where it is not of this model type."""
        config = config.get("vision_config") or config
        if config.get("model_type", self.model.config.model_type) != self.model.config.model_type:
            return {}
        asked = {f"config.{name}": config[name] for name in UNSEEN if name in config}
        return {name: value for name, value in asked.items() if name in self.arguments}

    @staticmethod
    def recognises(names: Collection[str], config: Mapping[str, Any] | None) -> str | None:
        """How to name this backbone for a file in transformers' layout."""
        if config is not None and isinstance(config.get("model_type"), str) and "auto_map" not in config:
            return 'type="TransformersBackbone"'
        embedded = any("embeddings." in name for name in names)
        numbered = any(re.search(r"\blayers?\.0\.", name) for name in names)
        internvit = any("layers.0.attn.qkv" in name for name in names)
        return 'type="TransformersBackbone"' if embedded and numbered and not internvit else None

    def exported(self, layout: str) -> tuple[dict[str, tuple[str | Part, ...]], dict[str, Any] | None]:
        """Our name -> the key of each parameter and buffer in the files that transformers itself would write,
        and the config.json of the model without what was left out."""
        kept = {name for name, _ in self.model.named_parameters()} | persistent_buffers(self.model)
        names = [name for name in self._kind.whole if name in kept]
        found = places(published_keys(self.model, names))
        config = {name: value for name, value in self._published.items() if name not in MAPS}
        config["architectures"] = [type(self.model).__name__]
        for field in ("num_hidden_layers", *HEADS):
            if hasattr(self.model.config, field):
                config[field] = getattr(self.model.config, field)
        if self._kind.map_indices:
            config["out_indices"] = self._kind.map_indices
        return {f"model.{name}": place for name, place in found.items()}, config

    def layer_id(self, name: str) -> int:
        """The layer of a parameter: 0 before the blocks, n + 1 in block n (and between it and the next),
        depth + 1 behind them and in the neck. Raises ValueError for a model of stages whose blocks are not
        known."""
        if not self._layer_ids:
            raise ValueError(
                f"{type(self.model).__name__} has no layers; use one learning rate for all of it"
            )
        return self.depth + 1 if name.startswith("neck.") else self._layer_ids[name.removeprefix("model.")]

    def feature_maps(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h / s, w / s) for each of out_indices, s its stride."""
        return self._kind.maps(image)

    def query_stages(
        self, image: Tensor, queries: Tensor, last_blocks: int, attended: Attended | None
    ) -> Stages:
        """As of `PlainModel`."""
        if not isinstance(self._kind, PlainModel):
            raise TypeError("queries can join plain transformers only")  # num_blocks is 0
        return self._kind.query_stages(image, queries, last_blocks, attended)


def _resizable(kind: PlainModel) -> dict[str, tuple[Any, Any]]:
    """Absolute position embedding and patch kernel. Asks no shape of a parameter: ZeRO-3 may have partitioned
    it."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, _ in kind.model.named_parameters():
        if "position_embedding" in name and (grid := kind.position_grid()) is not None:
            found[f"model.{name}"] = (
                partial(_is_embedding, grid=grid),
                partial(_resize_embedding, grid=grid),
            )
    for name, module in kind.model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == kind.patch:
            found[f"model.{name}.weight"] = (is_patch_kernel, resize_patch_kernel)
    return found


def _image_kernel(kind: StagedModel) -> dict[str, tuple[Any, Any]]:
    """The first convolution of a model of stages, which sees the image."""
    first = next((name for name, each in kind.model.named_modules() if isinstance(each, nn.Conv2d)), None)
    return {} if first is None else {f"model.{first}.weight": (is_image_kernel, adapt_channels)}


def _is_embedding(in_file: torch.Size, in_model: torch.Size, grid: tuple[int, int]) -> bool:
    """Whether `in_file` is ([1,] prefix + s * s, c) with the prefix and c of `in_model`, which has `grid`."""
    prefix = in_model[-2] - math.prod(grid)
    if len(in_file) != len(in_model) or prefix < 0:
        return False
    return is_square_embedding(torch.Size([1, *in_file[-2:]]), torch.Size([1, *in_model[-2:]]), prefix)


def _resize_embedding(embedding: Tensor, shape: torch.Size, grid: tuple[int, int]) -> Tensor:
    """embedding: ([1,] prefix + s * s, c) -> `shape` ([1,] prefix + h * w, c) with (h, w) = grid."""
    prefix = shape[-2] - math.prod(grid)
    return resize_position_embedding(embedding.view(1, *embedding.shape[-2:]), grid, prefix).view(shape)
