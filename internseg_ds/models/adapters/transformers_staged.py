"""Models of stages of transformers, by its own backbone classes. Letters: b images, (h, w) a size, c channels, s
the stride of a map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from internseg_ds.models.adapters.library_backbone import chosen_maps
from internseg_ds.models.adapters.transformers_parts import map_indices, names_of, other_size, pair, undrawn
from internseg_ds.models.layers import DropPath
from internseg_ds.models.repeated_blocks import repeated_blocks

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
        names = {module: name for name, module in self.model.named_modules()}
        self._blocks = [f"{names[block]}." for block in repeated_blocks(self.model)]
        self.layers = len(self._blocks)
        self._exact_drop_path()
        self._freeze_unused(count)

    def _exact_drop_path(self) -> None:
        for owner in list(self.model.modules()):
            for name, child in list(owner.named_children()):
                if type(child).__name__.endswith("DropPath") and hasattr(child, "drop_prob"):
                    setattr(owner, name, DropPath(child.drop_prob or 0.0))

    def _freeze_unused(self, count: int) -> None:
        """Freezes the stages behind the last map, and the norms that no map passes."""
        path, stages = next(
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        )
        for stage in stages[self.chosen[-1] + 1 :]:
            stage.requires_grad_(False)
        last: Any = stages[self.chosen[-1]]
        if isinstance(after := getattr(last, "downsample", None), nn.Module):  # Swin's comes behind the map
            after.requires_grad_(False)
        owner = self.model
        for part in path.split("."):
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
        """The layer of each parameter: 0 before the first block, n + 1 in block n and between it and the next,
        the last for the norms of the maps."""
        layer, found = 0, {}
        for name, _ in self.model.named_parameters():
            inside = next((index for index, block in enumerate(self._blocks) if name.startswith(block)), None)
            layer = layer if inside is None else inside + 1
            found[name] = self.layers + 1 if name.startswith(f"{self.norms}.") else layer
        return found
