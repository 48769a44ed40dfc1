"""Models of stages of transformers, by its own backbone classes. Letters: b images, (h, w) a size, c channels, s
the stride of a map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from internseg_ds.models.adapters.library_backbone import chosen_maps
from internseg_ds.models.adapters.transformers_parts import map_indices, names_of, other_size, pair, undrawn
from internseg_ds.models.layers import DropPath

FIXED_SIZE = ("hiera",)
"""Model types of stages that take images of their configuration's size alone."""


class StagedModel:
    """A model of stages, by its backbone class; that gives each map a norm of its own, which published files
    do not have. Stages are numbered from 0; drop-path rates are transformers' own."""

    norms = "hidden_states_norms"

    def __init__(
        self, kind: Any, config: Any, out_indices: Sequence[int] | None, *, final_norm: bool
    ) -> None:
        if final_norm:
            raise ValueError(
                f"final_norm=True, but the maps of transformers' {config.model_type} pass norms of their own; "
                "drop it"
            )
        self.config = config
        self.name = config.model_type
        count = len(config.depths)
        self.chosen = chosen_maps(out_indices, count, f"transformers' {self.name}")
        self.map_indices = map_indices(config, self.chosen, count)
        config.out_indices = self.map_indices
        self.model: Any = undrawn(kind, config)
        model: Any = self.model
        self.channels: list[int] = list(model.channels)
        self.whole = names_of(self.model)
        self._path, self._stages = _stages(self.model, count)
        self._layer_ids = self._numbered(config.depths)
        self.layers = sum(config.depths[: self.chosen[-1] + 1]) if self._layer_ids else 0
        self._exact_drop_path()
        self._freeze_unused()

    def _exact_drop_path(self) -> None:
        for owner in list(self.model.modules()):
            for name, child in list(owner.named_children()):
                if type(child).__name__.endswith("DropPath") and hasattr(child, "drop_prob"):
                    setattr(owner, name, DropPath(child.drop_prob or 0.0))

    def _freeze_unused(self) -> None:
        """Freezes the stages behind the last map, and the norms that no map passes."""
        for stage in self._stages[self.chosen[-1] + 1 :]:
            stage.requires_grad_(False)
        last: Any = self._stages[self.chosen[-1]]
        if isinstance(after := getattr(last, "downsample", None), nn.Module):  # Swin's comes behind the map
            after.requires_grad_(False)
        owner = self.model
        for part in self._path.split("."):
            names = [name for name, _ in owner.named_children()]
            for name in names[names.index(part) + 1 :]:
                if name != self.norms:
                    getattr(owner, name).requires_grad_(False)
            owner = getattr(owner, part)

    def maps(self, image: Tensor) -> list[Tensor]:
        """image: (b, 3, h, w) -> one map (b, c, h / s, w / s) for each of `chosen`."""
        size = getattr(self.config, "image_size", None)
        if self.name in FIXED_SIZE and tuple(image.shape[2:]) != pair(size):
            raise other_size(self.name, pair(size), image)
        return list(self.model(pixel_values=image).feature_maps)

    def layer_ids(self) -> dict[str, int]:
        """The layer of each parameter, as timm numbers those of the same models (`group_matcher`): 0 before the
        first block, n + 1 in block n, a downsampling layer with the block behind it and a norm with that before
        it; the last for the norms of the maps. Empty where the stages do not hold the blocks that `depths` of
        the configuration counts."""
        return self._layer_ids

    def _numbered(self, depths: Sequence[int]) -> dict[str, int]:
        used = sum(depths[: self.chosen[-1] + 1])
        starts: dict[str, int] = {}  # beginnings of names; the longest that fits a name says its layer
        first = 1
        for index, (stage, depth) in enumerate(zip(self._stages, depths, strict=True)):
            found = _blocks_of(stage, depth)
            if found is None:
                return {}
            path, behind = found
            name = f"{self._path}.{index}."
            starts[name] = first if index else 0
            starts |= {f"{name}{child}.": min(first + depth - 1, used) for child in behind}
            starts |= {f"{name}{path}{block}.": first + block for block in range(depth)}
            first += depth
            if "downsample" in behind:
                starts[f"{name}downsample."] = first
        starts[f"{self.norms}."] = used + 1
        ids, elsewhere = {}, 0
        for name, _ in self.model.named_parameters():
            own = max((start for start in starts if name.startswith(start)), key=len, default=None)
            ids[name] = elsewhere if own is None else min(starts[own], used + 1)
            elsewhere = elsewhere if own is None else used  # behind the stages: with the last block
        return ids


def _stages(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The list of the model's `count` stages, and its name."""
    return next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )


def _blocks_of(stage: nn.Module, depth: int) -> tuple[str, list[str]] | None:
    """Where a stage has its `depth` blocks: the beginning of their names, and the names of the stage's children
    behind them. None where it has no such list."""
    if isinstance(stage, (nn.ModuleList, nn.Sequential)) and len(stage) == depth:
        return "", []
    names = [name for name, _ in stage.named_children()]
    for name, child in stage.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) == depth and "down" not in name:
            return f"{name}.", names[names.index(name) + 1 :]
    return None
