"""Plain vision transformers of transformers: blocks that pass one sequence of tokens on. Letters: b images,
(h, w) a size, n tokens, c channels."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internseg_ds.models.adapters.library_backbone import chosen_maps
from internseg_ds.models.adapters.transformers_parts import (
    map_indices,
    names_of,
    other_size,
    pair,
    undrawn,
    without_empty_register_tokens,
)
from internseg_ds.models.derived_class import derived_class, once_per_class
from internseg_ds.models.eomt.joined_queries import Attended, JoinedQueries, Stages
from internseg_ds.models.layers import DropPath

MASK = "attention_mask"
"""The argument of a block by which its attention is masked."""
HEADS = ("vision_use_head", "use_head")
"""Fields of a configuration that say whether the model has a pooling head."""
BRANCHES = {
    "aimv2_vision_model": ("attention", "ffn"),
    "clip_vision_model": ("self_attn", "mlp"),
    "internvl_vision": ("attention", "mlp"),
    "siglip2_vision_model": ("self_attn", "mlp"),
    "siglip_vision_model": ("self_attn", "mlp"),
    "vit": ("attention", "mlp"),
}
"""Of model types without drop path: the modules of a block whose outputs are added to the residual stream."""


class PlainModel:
    """A plain vision transformer.

    model: the module. whole: names of its parameters and buffers before those behind the last of `chosen`, and
    a pooling head, were removed. norm: name of its last norm, "" for none; it does not train unless maps pass it.
    """

    def __init__(
        self,
        kind: Any,
        config: Any,
        out_indices: Sequence[int] | None,
        drop_path_rate: float,
        *,
        final_norm: bool,
    ) -> None:
        self.config = config
        self.name = config.model_type
        self.depth = config.num_hidden_layers
        self.chosen = chosen_maps(out_indices, self.depth, f"transformers' {self.name}")
        self.channels = [config.hidden_size] * len(self.chosen)
        self.map_indices = map_indices(config, self.chosen, self.depth)
        self.patch = pair(config.patch_size)
        self.model: Any = undrawn(kind, config)
        self.whole = names_of(self.model)
        without_empty_register_tokens(self.model)
        self.blocks_name, blocks = _blocks(self.model, self.depth)
        self.norm = self._prune(blocks)
        if final_norm and not self.norm:
            raise ValueError(f"final_norm=True, but transformers' {self.name} has no last norm; drop it")
        self.final_norm = final_norm
        if self.norm and not final_norm:
            self.model.get_submodule(self.norm).requires_grad_(False)
        self._set_drop_path(blocks, drop_path_rate)
        self._parameters = _inputs_of(kind)
        self.layers = len(blocks)
        self._blocks = list(blocks)
        self._caches = list(_caches(kind))

    def _prune(self, blocks: nn.ModuleList) -> str:
        """Removes the blocks behind the last map, and what follows the blocks but a norm, whose name is
        returned ("" for none)."""
        last = self.chosen[-1] + 1
        del blocks[last:]
        self.config.num_hidden_layers = last
        norm, owner, path = "", self.model, self.blocks_name.split(".")
        for depth, part in enumerate(path):
            names = [name for name, _ in owner.named_children()]
            for name in names[names.index(part) + 1 :]:
                child = getattr(owner, name)
                if not norm and "Norm" in type(child).__name__:
                    norm = ".".join([*path[:depth], name])
                elif any(True for _ in child.parameters()):
                    setattr(owner, name, _Nothing())
            owner = getattr(owner, part)
        for head in HEADS:
            if hasattr(self.config, head):
                setattr(self.config, head, False)
        return norm

    def _set_drop_path(self, blocks: nn.ModuleList, rate: float) -> None:
        """Rates that grow linearly with depth, from 0 in the first block to `rate` in the last of the whole
        model."""
        for index, block in enumerate(blocks) if rate else ():
            drop_path = DropPath(rate * index / max(self.depth - 1, 1))
            for name in BRANCHES.get(self.name, ()):
                branch = getattr(block, name)
                branch.add_module("drop_path", drop_path)
                branch.register_forward_hook(_drop)
            for owner in list(block.modules()):
                for name, child in list(owner.named_children()):
                    if type(child).__name__.endswith("DropPath") and not isinstance(child, DropPath):
                        setattr(owner, name, drop_path)

    def watch_blocks(self) -> None:
        """Makes calls of the blocks note what they return. Once, before `maps`, and after `checkpoint_calls`."""
        block: Any
        for block in self._blocks:
            block.__class__ = _recording_class(type(block))
            block.results = block.joined = None

    def position_grid(self) -> tuple[int, int] | None:
        """(h, w) of the patches that an absolute position embedding is made for."""
        side = getattr(self.config, "max_img_size", getattr(self.config, "image_size", None))
        if side is None:
            patches = getattr(self.config, "num_patches", None)
            return None if patches is None else (math.isqrt(patches),) * 2
        height, width = pair(side)
        return height // self.patch[0], width // self.patch[1]

    def maps(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h / patch, w / patch) for each of `chosen`.

        Raises ValueError for images of a size that the model cannot take.
        """
        grid = self._grid(image)
        results = self._results(image, grid, self.chosen)
        norm = self._last_norm()
        tokens = grid[0] * grid[1]
        # class and register tokens stand in front
        return [norm(results[index])[:, -tokens:].mT.unflatten(2, grid) for index in self.chosen]

    def takes_masks(self) -> bool:
        """Whether queries can join its blocks: all take a mask of their attention."""
        return all(MASK in inspect.signature(type(block).forward).parameters for block in self._blocks)

    def query_stages(
        self, image: Tensor, queries: Tensor, last_blocks: int, attended: Attended | None
    ) -> Stages:
        """As of `models.eomt.joined_queries`: the model runs as ever, and its last blocks are given queries (b,
        q, c) beside what it gives them. Raises ValueError as `maps` does."""
        grid = self._grid(image)
        joined = JoinedQueries(queries, self._last_norm(), grid, attended)
        last = len(self._blocks) - 1
        entered: list[Any] = self._blocks[-last_blocks:]
        for block in entered:
            block.joined = joined
        try:
            results = self._results(image, grid, [last])
        finally:
            for block in entered:
                block.joined = None
        return joined.stages(results[last])

    def _grid(self, image: Tensor) -> tuple[int, int]:
        """(h, w) in patches. Raises ValueError where an image is no whole patches."""
        height, width = image.shape[2:]
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"image of {height} x {width} pixels is not a multiple of the patch size "
                f"{self.patch[0]} x {self.patch[1]}"
            )
        return height // self.patch[0], width // self.patch[1]

    def _last_norm(self) -> nn.Module:
        return self.model.get_submodule(self.norm) if self.final_norm else nn.Identity()

    def _results(self, image: Tensor, grid: tuple[int, int], wanted: Sequence[int]) -> dict[int, Tensor]:
        """Runs the model; the output of each of the blocks `wanted`, by its index."""
        results: dict[int, Tensor] = {}
        for index in wanted:
            block: Any = self._blocks[index]
            block.results, block.result_index = results, index
        for clear in self._caches:
            clear()
        try:
            self.model(**self._inputs(image, grid))
        finally:
            for block in self._blocks:
                block.results = None
        return results

    def _inputs(self, image: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """The arguments of the model's forward pass."""
        if "spatial_shapes" in self._parameters:  # SigLIP2 takes patches, laid out (row, column, channel)
            patches = image.unflatten(3, (grid[1], self.patch[1])).unflatten(2, (grid[0], self.patch[0]))
            return {
                "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
                "pixel_attention_mask": None,
                "spatial_shapes": np.array([grid] * len(image)),  # read on the host
            }
        size = getattr(self.config, "image_size", None)
        if size is not None and tuple(image.shape[2:]) != pair(size):
            if "interpolate_pos_encoding" in self._parameters:
                return {"pixel_values": image, "interpolate_pos_encoding": True}
            if getattr(self.config, "is_native", True) is False:
                raise other_size(self.name, pair(size), image)
        return {"pixel_values": image}

    def layer_ids(self) -> dict[str, int]:
        """The layer of each parameter: 0 before the blocks, n + 1 in block n, the last behind them."""
        count, behind = len(self._blocks), False
        found = {}
        for name, _ in self.model.named_parameters():
            inner = name.removeprefix(f"{self.blocks_name}.")
            if inner != name:
                found[name] = int(inner.partition(".")[0]) + 1
            else:
                behind = behind or bool(self.norm and name.startswith(f"{self.norm}."))
                found[name] = count + 1 if behind else 0
        return found


class _Nothing(nn.Module):
    """In the place of what follows the blocks: passes its input on."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _drop(branch: Any, _: Any, output: Any) -> Any:
    """A hook: the branch's output, the first of a tuple, passes its `drop_path`."""
    if isinstance(output, tuple):
        return (branch.drop_path(output[0]), *output[1:])
    return branch.drop_path(output)


@once_per_class
def _recording_class(owner: type[nn.Module]) -> type[nn.Module]:
    """A subclass that notes what a call returns in `results`, where there is one, and gives the call the queries
    of `joined`, where there are any. From outside of the call, so that a block which runs again in the backward
    pass notes nothing."""
    names = list(inspect.signature(owner.forward).parameters)[1:]

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        if self.joined is not None:
            values, mask = self.joined.before_block(args[0])
            given = dict(zip(names, args)) | keywords  # the mask is given by position or by name
            given |= {names[0]: values, MASK: None if mask is None else _added(mask, values)}
            args, keywords = (given.pop(names[0]),), given
        output = owner.__call__(self, *args, **keywords)
        if self.results is not None:
            self.results[self.result_index] = output[0] if isinstance(output, tuple) else output
        return output

    return derived_class(owner, {"__call__": call})


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """mask: bool, true where a token attends -> what is added to the scores of attention, in the dtype of
    `like`: all implementations of transformers take that."""
    least = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, least)


def _blocks(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return name, module
    raise ValueError(f"{type(model).__name__} of transformers has no list of {depth} blocks")


def _inputs_of(kind: Any) -> set[str]:
    """The arguments of a class's forward pass."""
    return set(inspect.signature(kind.forward).parameters)


def _caches(kind: Any) -> Iterator[Callable[[], None]]:
    """What empties the caches of tensors that a model's file has (DINOv3's positions): a tensor that was made
    in a pass without values, or in inference mode, would come back in the next pass."""
    for function in vars(sys.modules[kind.__module__]).values():
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                yield cell.cell_contents.cache_clear
