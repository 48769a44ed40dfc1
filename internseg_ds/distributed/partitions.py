"""Which elements of which parameter this rank's optimizer holds: the flat fp32 partitions of ZeRO-1, 2 and 3, and the place of each parameter in them."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import nn

from internseg_ds.distributed.parameter_groups import full_shape


@dataclass(frozen=True)
class Place:
    """Elements [start, stop) of a parameter laid out flat lie in partition number `partition`, from element `offset` on."""

    partition: int
    offset: int
    start: int
    stop: int

    @property
    def held(self) -> slice:
        """Where these elements lie in the partition."""
        return slice(self.offset, self.offset + self.stop - self.start)


def partitions(engine: Any) -> list[nn.Parameter]:
    """The flat fp32 tensors (masters) of this rank, one a group (ZeRO-1, 2) or sub-group (ZeRO-3): what the inner optimizer updates."""
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):  # ZeRO-3; 1 and 2; 1 with fp32 gradients
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise TypeError(f"{type(engine.optimizer).__name__} is no optimizer of ZeRO-1, 2 or 3")


def place_of(engine: Any, param: nn.Parameter) -> Place | None:
    """Where this rank holds its part of `param`; None for a frozen parameter, and for one of which it holds nothing."""
    if not param.requires_grad:
        return None
    if (
        engine.zero_optimization_stage() == 3
    ):  # rank r of n: elements [r * share, (r + 1) * share), padded behind the last
        optimizer, numel, share = engine.optimizer, full_shape(param).numel(), param.ds_tensor.ds_numel
        partition, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        start = min(dist.get_rank(param.ds_process_group) * share, numel)
        return Place(partition, offset, start, min(start + share, numel))
    fragment = param._hp_mapping  # DeepSpeed's note of what lies in this rank's partition of the group
    if fragment is None:
        return None
    held = fragment.lp_fragment_address
    return Place(
        fragment.param_group_index, fragment.hp_fragment_address.start, held.start, held.start + held.numel
    )


def weights_follow(engine: Any) -> None:
    """Copies the masters into the parameters that modules compute with, after the masters were changed from outside, as an optimizer step does. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()  # small parameters stay gathered between steps
    for index in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
