"""What the backbones of other libraries have in common: activation checkpointing of their blocks, freezing, and
a neck behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.runner import BaseModule
from mmseg.models.builder import build_neck
from torch import Tensor, nn

from internseg_ds.models.activation_checkpointing import CheckpointingPolicy, checkpoint_calls
from internseg_ds.models.eomt.joined_queries import Attended, Stages
from internseg_ds.models.repeated_blocks import repeated_blocks
from internseg_ds.torch_internals import reset_parameters_of

NEVER_TRAINED = ("mask_token",)
"""Parameters for pretraining objectives, by the last part of their names: no loss here reaches them."""


class LibraryBackbone(BaseModule):
    """A model of another library, under the name `model`, and a neck.

    model: built, and without what no feature map depends on. channels: of its maps. The other arguments are
    those of the subclasses. A subclass computes the maps in `feature_maps`.
    """

    not_pretrained: tuple[str, ...] = ("neck.",)

    def __init__(
        self,
        model: nn.Module,
        channels: Sequence[int],
        *,
        with_cp: bool,
        freeze: bool,
        neck: Mapping[str, Any] | str | None,
        pretrained: str | None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    ) -> None:
        super().__init__(init_cfg)
        self.model: Any = model
        self.pretrained = pretrained
        self.with_cp = with_cp
        self.freeze = freeze
        self._blocks = repeated_blocks(model)
        self.recomputation: CheckpointingPolicy
        if self._blocks:  # else it is no `CheckpointingBackbone`
            self.recomputation = "blocks"
        checkpoint_calls(self._blocks)
        for name, param in self.named_parameters():
            if freeze or name.rpartition(".")[2] in NEVER_TRAINED:
                param.requires_grad_(False)
        self.model_channels = tuple(channels)
        self.neck = _neck(neck, self.model_channels)
        self.channels: tuple[int, ...] = tuple(getattr(self.neck, "channels", channels))

    def feature_maps(self, image: Tensor) -> Sequence[Tensor]:
        """image: (b, 3, h, w) -> maps (b, c, h / s, w / s), before the neck."""
        raise NotImplementedError

    def _check_maps(self, image: Tensor, maps: Sequence[Tensor]) -> None:
        """Raises ValueError unless there is a map of each image, of the channels that the library names."""
        expected = [(image.size(0), channels) for channels in self.model_channels]
        if (found := [tuple(features.shape[:2]) for features in maps]) != expected:
            raise ValueError(
                f"{type(self.model).__name__} gives maps of (images, channels) {found} where {expected} are due; "
                "it is no backbone for segmentation"
            )

    def train(self, mode: bool = True) -> "LibraryBackbone":
        """Frozen, the library's model stays in evaluation mode: nothing is dropped, and batch norms keep their
        statistics."""
        super().train(mode)
        if self.freeze:
            self.model.eval()
        return self

    def query_stages(
        self, image: Tensor, queries: Tensor, last_blocks: int, attended: Attended | None
    ) -> Stages:
        """Run the model with queries (b, q, c) in front of the tokens of its last blocks; as of
        `models.eomt.joined_queries`."""
        raise NotImplementedError

    def forward(
        self,
        image: Tensor,
        queries: Tensor | None = None,
        *,
        last_blocks: int = 0,
        attended: Attended | None = None,
    ) -> tuple[Any, ...]:
        """image: (b, 3, h, w) -> one map (b, c, h / s, w / s) for each of out_indices, s its stride, or the
        neck's maps, in the dtype that the model computes in.

        Where queries (b, q, c) are given, they join the last blocks, and the result is `Stages`.
        """
        block: Any
        for block in self._blocks:
            block.recomputation = self.recomputation if self.with_cp and self.training else "none"
        if queries is not None:
            return self.query_stages(image, queries, last_blocks, attended)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            maps = self.feature_maps(image)
        self._check_maps(image, maps)
        if self.neck is not None:
            maps = self.neck(maps)
        return tuple(features.contiguous() for features in maps)


def reset_modules(model: nn.Module) -> None:
    """Draw the initial values that each module by itself has."""
    for module in model.modules():
        if (reset := reset_parameters_of(module)) is not None:
            reset()


def chosen_maps(out_indices: Sequence[int] | None, count: int, model: str) -> tuple[int, ...]:
    """The indices of the feature maps: `out_indices`, or else all of few, and the ends of the four quarters of
    many. count: how many `model` has.

    Raises ValueError unless they are ascending numbers below `count`.
    """
    if out_indices is None:
        out_indices = range(count) if count <= 5 else [count * part // 4 - 1 for part in range(1, 5)]
    wrong = [index for index in out_indices if not 0 <= index < count]
    if wrong or not list(out_indices) or list(out_indices) != sorted(set(out_indices)):
        raise ValueError(
            f"out_indices={list(out_indices)} must be ascending numbers from 0 to {count - 1}, of the feature "
            f"maps that {model} has"
        )
    return tuple(out_indices)


def _neck(neck: Mapping[str, Any] | str | None, channels: tuple[int, ...]) -> nn.Module | None:
    """The neck of a config behind maps of these channels."""
    if neck is None:
        return None
    settings = {"type": neck} if isinstance(neck, str) else dict(neck)
    return build_neck({"in_channels": list(channels), **settings})
