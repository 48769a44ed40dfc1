"""A plain vision transformer of transformers for semantic segmentation, in a file that needs torch, transformers and
segmentation_parts.py beside it.

A folder with these files, its config.json and its weights is loaded by
`AutoModelForSemanticSegmentation.from_pretrained(FOLDER, trust_remote_code=True)`. Letters: b images, (h, w) a size, n
tokens, c channels.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from .segmentation_parts import SegmentationConfig, SegmentationModel, build_pyramid


class PlainTransformerConfig(SegmentationConfig):
    """backbone_settings: the arguments of `PlainTransformer`."""

    model_type = "plain_transformer_segmentation"


class Nothing(nn.Module):
    """In the place of what follows the blocks: passes its input on."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class PlainTransformer(nn.Module):
    """model: the fields of its configuration, model_type among them. patch_size: (vertical, horizontal). out_indices:
    blocks whose patch tokens become maps. blocks: the name of their list in the model. norm: the name of the last
    norm, which the maps pass with final_norm; "" for none. pyramid: a feature pyramid behind the maps, or None."""

    def __init__(
        self,
        model: Mapping[str, Any],
        patch_size: Sequence[int],
        out_indices: Sequence[int],
        blocks: str,
        norm: str,
        final_norm: bool,
        pyramid: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.patch, self.out_indices = list(patch_size), list(out_indices)
        self.blocks, self.norm = blocks, norm if final_norm else ""
        self.model: Any = AutoModel.from_config(AutoConfig.for_model(**model))
        self._prune(keep=norm)
        self.neck = build_pyramid(pyramid)

    def _prune(self, keep: str) -> None:
        """Removes what follows the blocks, but for the norm of this name, and register tokens without elements."""
        owner, path = self.model, self.blocks.split(".")
        for depth, part in enumerate(path):
            names = [name for name, _ in owner.named_children()]
            for name in names[names.index(part) + 1 :]:
                child = getattr(owner, name)
                if ".".join([*path[:depth], name]) != keep and any(True for _ in child.parameters()):
                    setattr(owner, name, Nothing())
            owner = getattr(owner, part)
        for module in self.model.modules():
            tokens = dict(module.named_parameters(recurse=False)).get("register_tokens")
            if tokens is not None and not tokens.numel():
                del module.register_tokens
                module.register_buffer("register_tokens", tokens.detach(), persistent=False)

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, 3, h, w), sides multiples of a patch -> maps (b, c, h / patch, w / patch)."""
        grid = (image.size(2) // self.patch[0], image.size(3) // self.patch[1])
        found: dict[int, Tensor] = {}

        def keep(index: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> None:
                found[index] = output[0] if isinstance(output, tuple) else output

            return hook

        blocks = self.model.get_submodule(self.blocks)
        hooks = [blocks[index].register_forward_hook(keep(index)) for index in self.out_indices]
        try:
            self.model(**self._inputs(image, grid))
        finally:
            for hook in hooks:
                hook.remove()
        norm = self.model.get_submodule(self.norm) if self.norm else nn.Identity()
        tokens = grid[0] * grid[1]  # class and register tokens stand in front
        maps = [
            norm(found[index])[:, -tokens:].mT.unflatten(2, grid).contiguous() for index in self.out_indices
        ]
        return maps if self.neck is None else self.neck(maps)

    def _inputs(self, image: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        arguments = inspect.signature(type(self.model).forward).parameters
        if "spatial_shapes" in arguments:  # SigLIP2 takes patches, laid out (row, column, channel)
            patches = image.unflatten(3, (grid[1], self.patch[1])).unflatten(2, (grid[0], self.patch[0]))
            return {
                "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
                "pixel_attention_mask": None,
                "spatial_shapes": torch.tensor([grid] * len(image)),
            }
        made_for: Any = getattr(self.model.config, "image_size", None)
        made_for = [made_for] * 2 if isinstance(made_for, int) else made_for
        if "interpolate_pos_encoding" in arguments and list(made_for or image.shape[2:]) != list(
            image.shape[2:]
        ):
            return {"pixel_values": image, "interpolate_pos_encoding": True}
        return {"pixel_values": image}


class PlainTransformerForSemanticSegmentation(SegmentationModel):
    """A plain transformer and a head."""

    config_class = PlainTransformerConfig

    def build_backbone(self, **settings: Any) -> nn.Module:
        return PlainTransformer(**settings)
