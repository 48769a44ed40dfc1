"""The settings of a run that decide what ZeRO keeps, sends and updates, read from a ds_config in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from internseg_ds.config.ds_config import DsConfig, Precision
from internseg_ds.moment_formats import BYTES_PER_MOMENT, OptimizerStates
from internseg_ds.zero_partition import full_shape

Place = Literal["none", "cpu", "nvme"]
"""Where a ds_config offloads to; "none": the device."""

REDUCE_BUCKET = 500_000_000
SUB_GROUP = 1_000_000_000
"""Elements: DeepSpeed's own defaults (`runtime/zero/config.py`)."""


@dataclass(frozen=True)
class ZeroSettings:
    """zero: the `zero_optimization` section of a ds_config without "auto" values. accumulation: micro-batches
    per optimizer step. optimizer_states: in what Adam holds its moments. bf16_master: whether the weights
    that it updates are bf16."""

    zero: Mapping[str, Any]
    precision: Precision
    world_size: int
    accumulation: int = 1
    optimizer_states: OptimizerStates = "fp32"
    bf16_master: bool = False

    @classmethod
    def of(cls, ds: DsConfig) -> "ZeroSettings":
        return cls(
            ds.raw.get("zero_optimization", {}),
            ds.precision,
            ds.world_size,
            ds.accumulation,
            ds.optimizer_states,
            ds.bf16_master,
        )

    @property
    def stage(self) -> int:
        return self.zero.get("stage", 0)

    @property
    def bytes_per_weight(self) -> int:
        """Of a parameter that modules compute with, and of its gradient."""
        return 2 if self.precision == "bf16" else 4

    @property
    def bytes_per_master(self) -> int:
        """Of a weight as the optimizer updates it, and of the gradient that it is given."""
        return 2 if self.bf16_master else 4

    @property
    def bytes_of_moments(self) -> float:
        """Of Adam's two moments of a parameter."""
        return 2 * BYTES_PER_MOMENT[self.optimizer_states]

    @property
    def optimizer_bytes(self) -> float:
        """Of optimizer state per parameter: the weights that it updates, and its moments. Parameters in fp32
        that are whole (ZeRO-0) are themselves what it updates."""
        own = self.stage or self.bytes_per_weight == 2
        return self.bytes_of_moments + (self.bytes_per_master if own else 0)

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that the optimizer's state is divided among."""
        return self.world_size if self.stage else 1

    @property
    def weight_ranks(self) -> int:
        """Ranks that the parameters are divided among."""
        return self.world_size if self.stage == 3 else 1

    @property
    def node_size(self) -> int:
        """Ranks that hpZ's second copy of the weights is divided among; 1 without hpZ."""
        return int(self.zero.get("zero_hpz_partition_size", 1))

    @property
    def optimizer_at(self) -> Place:
        return self.zero.get("offload_optimizer", {}).get("device", "none")

    @property
    def weights_at(self) -> Place:
        return self.zero.get("offload_param", {}).get("device", "none")

    @property
    def optimizer_offloaded(self) -> bool:
        return self.optimizer_at != "none"

    @property
    def weights_offloaded(self) -> bool:
        return self.weights_at != "none"

    @property
    def computes_with_partitions(self) -> bool:
        """Whether nothing is gathered and nothing copied: one process computes with its partition, which is the
        whole parameter (partition_parameters.py, `NoGatherHandle`)."""
        return self.stage == 3 and self.world_size == 1 and not self.weights_offloaded

    @property
    def overlaps(self) -> bool:
        """Whether communication runs beside computation; DeepSpeed's default is that ZeRO-3 alone does."""
        return bool(self.zero.get("overlap_comm", self.stage == 3))

    @property
    def hooks_on_blocks(self) -> bool:
        """Whether no hook of DeepSpeed is inside a block, so that blocks can be compiled."""
        return self.stage != 3 or bool(self.zero.get("leaf_module", {}).get("classes"))

    @property
    def reduce_bucket(self) -> int:
        """Elements of a bucket of gradients."""
        return int(float(self.zero.get("reduce_bucket_size", REDUCE_BUCKET)))

    def elements_updated_at_once(self, group_size: int) -> int:
        """Elements of a parameter group that one rank updates at once: its share, or ZeRO-3's sub-group of it
        (which may in fact hold up to a parameter more)."""
        share = group_size // self.optimizer_ranks
        if self.stage < 3:
            return share
        return min(share, int(float(self.zero.get("sub_group_size", SUB_GROUP))))


def total_elements(model: nn.Module) -> int:
    """Of all parameters, also of those that ZeRO-3 has partitioned."""
    return sum(full_shape(param).numel() for param in model.parameters())


def trained_sizes(model: nn.Module) -> list[int]:
    """Elements of each parameter that trains, in the order of the model."""
    return [full_shape(param).numel() for param in model.parameters() if param.requires_grad]


def trained_elements(model: nn.Module) -> int:
    return sum(trained_sizes(model))


def saved_elements(model: nn.Module, stage: int) -> int:
    """Of the weights that lie in a checkpoint beside the optimizer's: all of them under ZeRO-1 and 2, in the file of
    one process of each folder; those that do not train under ZeRO-3, divided among all processes."""
    return total_elements(model) - (trained_elements(model) if stage == 3 else 0)
