"""Bytes that the processes of a run exchange in one optimizer step, collective by collective, as DeepSpeed 0.19.8 does it.

Sources: Rajbhandari et al., "ZeRO" (2020), section 7, for what has to be exchanged; Wang et al., "ZeRO++" (2023), section 3.2, for hpZ; and DeepSpeed's own
code where it does otherwise: ZeRO-1 and ZeRO-2 reduce each bucket by an all-reduce and keep their share, which sends twice the bytes of a reduce-scatter.
`tests/planning/test_communication_counted.py` holds these numbers against the bytes of real runs. `docs/scaling.md` derives them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import nn

from internseg_ds.errors import ConfigError
from internseg_ds.planning.gathers import GatherSettings, gathers, leaves, persistent
from internseg_ds.planning.training_pass import Use

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
UNKNOWN = {
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "mics_shard_size": -1,
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "stage3_use_all_reduce_for_fetch_params": False,
}
"""Settings of `zero_optimization` that change what is sent, and the values for which the formulas hold."""


@dataclass(frozen=True)
class Collective:
    """Some collectives of one kind among `ranks` processes. payload: bytes of the whole tensors: after an all-gather, before a reduction."""

    kind: Kind
    what: Literal["weights", "gradients", "batch norm"]
    payload: int
    calls: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each process sends around a ring (Patarasuk and Yuan, 2009): a share of 1 / ranks to ranks - 1 neighbours, twice for an all-reduce."""
        return (2 if self.kind == "all_reduce" else 1) * self.payload * (self.ranks - 1) / self.ranks

    def sent_by_link(self, per_node: int) -> tuple[float, float]:
        """`sent`, split into what stays within a node of `per_node` processes and what leaves it.

        Each node has as many rings as GPUs, and each ring leaves it through another GPU's adapter: of what a GPU sends, 1 / per_node goes out.
        """
        if self.ranks <= per_node:
            return self.sent, 0.0
        return self.sent * (per_node - 1) / per_node, self.sent / per_node


@dataclass(frozen=True)
class Traffic:
    """One optimizer step: what goes on during each micro-batch, and what follows the last one."""

    micro_batches: tuple[tuple[Collective, ...], ...]
    after: tuple[Collective, ...]

    def __iter__(self) -> Iterable[Collective]:
        for part in (*self.micro_batches, self.after):
            yield from part


def check_known(zero: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting whose traffic is not modelled."""
    for key, known in UNKNOWN.items():
        if zero.get(key, known) != known:
            raise ConfigError(
                f"zero_optimization.{key}={zero[key]!r} changes what is sent in a way that the plan does not know; plan without it"
            )
    for key, value in zero.get("leaf_module", {}).items():
        if key != "classes" and value:
            raise ConfigError(
                f"zero_optimization.leaf_module.{key}={value!r} changes what is gathered in a way that the plan does not know; "
                "name classes alone, or plan without it"
            )


def step_traffic(
    model: nn.Module,
    uses: Sequence[Use],
    group_sizes: Sequence[int],
    zero: Mapping[str, Any],
    *,
    width: int,
    world_size: int,
    accumulation: int,
) -> Traffic:
    """model: on the meta device. uses: of a micro-batch, by `training_pass`. group_sizes: elements of each parameter group of the optimizer.

    zero: the `zero_optimization` section without "auto" values. width: bytes per weight and per gradient on the wire, 2 for bf16.
    Left out: the norms of the gradients and the losses that are logged, some hundred bytes a step.
    """
    check_known(zero)
    stage, n = zero.get("stage", 0), world_size
    norms = batch_norm_collectives(model, n)
    trained = [param.numel() for param in model.parameters() if param.requires_grad]
    if stage < 3:
        limit = int(float(zero.get("reduce_bucket_size", 500_000_000)))
        gradients = Collective("all_reduce", "gradients", width * sum(trained), buckets(trained, limit), n)
        often = (
            stage == 2
        )  # ZeRO-0 and ZeRO-1 add up whole gradients, and reduce them with those of the last micro-batch
        padded = sum(_padded(size, 2 * n) for size in group_sizes)
        weights = Collective("all_gather", "weights", width * padded, len(group_sizes), n)
        return Traffic(
            tuple((*norms, *((gradients,) if often or last else ())) for last in _lasts(accumulation)),
            (weights,) if stage else (),
        )
    settings = GatherSettings.of(zero)
    limit = int(float(zero.get("reduce_bucket_size", 500_000_000)))
    scattered = Collective(
        "reduce_scatter",
        "gradients",
        width * sum(_padded(size, n) for size in trained),
        buckets(reduced_together(model, settings), limit),
        n,
    )
    sizes = {name: _padded(param.numel(), n) for name, param in model.named_parameters()}
    made = gathers(model, uses, settings)
    node = int(zero.get("zero_hpz_partition_size", 1))
    first = _gathered(made, sizes, width, n, node)
    others = _gathered(made, sizes, width, n, node, secondary=set(sizes)) if node > 1 else first
    kept = persistent(model, settings)
    after = Collective("all_gather", "weights", width * sum(sizes[name] for name in kept), len(kept), n)
    return Traffic(
        tuple((*norms, *(first if index == 0 else others), scattered) for index in range(accumulation)),
        (after,),
    )


def _lasts(accumulation: int) -> list[bool]:
    return [index == accumulation - 1 for index in range(accumulation)]


def _gathered(
    made: Sequence[tuple[str, ...]],
    sizes: Mapping[str, int],
    width: int,
    world_size: int,
    node: int,
    secondary: set[str] = frozenset(),
) -> list[Collective]:
    """The gathers of a micro-batch by how far they reach. secondary: parameters that hpZ has a second partition of, within each group of `node` processes.

    It makes one when it first gives a parameter up, and drops all of them at each step.
    """
    secondary, elements, calls = set(secondary), {"all": 0, "node": 0}, {"all": 0, "node": 0}
    for params in made:
        near = [name for name in params if name in secondary]
        for reach, names in (("node", near), ("all", [name for name in params if name not in secondary])):
            elements[reach] += sum(sizes[name] for name in names)
            calls[reach] += bool(names)
        if node > 1:
            secondary.update(params)
    return [
        Collective("all_gather", "weights", width * elements[reach], calls[reach], ranks)
        for reach, ranks in (("all", world_size), ("node", node))
        if calls[reach]
    ]


def batch_norm_collectives(model: nn.Module, world_size: int) -> list[Collective]:
    """Of one micro-batch. Each nn.SyncBatchNorm of c channels exchanges 2 c + 1 numbers forward, and 2 c backward, in fp32."""
    channels = [module.num_features for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    if not channels:
        return []
    forward = sum(2 * c + 1 for c in channels)
    return [
        Collective("all_gather", "batch norm", 4 * forward * world_size, len(channels), world_size),
        Collective("all_reduce", "batch norm", 4 * sum(2 * c for c in channels), len(channels), world_size),
    ]


def reduced_together(model: nn.Module, settings: GatherSettings) -> list[int]:
    """Sizes of the gradients, the first to be reduced last. A leaf module's come together, those of parameter groups without decay (vectors) first."""
    inside = {
        id(param): leaf
        for leaf in leaves(model, settings.leaf_classes)
        for param in model.get_submodule(leaf).parameters()
    }
    trained = [param for param in model.parameters() if param.requires_grad]
    together = [
        list(params) for _, params in groupby(trained, key=lambda param: inside.get(id(param), id(param)))
    ]
    return [
        param.numel()
        for params in together
        for param in sorted(reversed(params), key=lambda param: param.dim() == 1)
    ]


def buckets(sizes: Sequence[int], limit: int) -> int:
    """How many reductions gradients of these sizes take: a bucket is sent when the next gradient, the last parameter's first, would not fit in."""
    made, held = 0, 0
    for size in reversed(sizes):
        if held and held + size > limit:
            made, held = made + 1, 0
        held += size
    return made + bool(held)


def host_bytes(
    model: nn.Module, traffic: Traffic, zero: Mapping[str, Any], *, width: int, world_size: int
) -> int:
    """Bytes that one process moves between its GPU and the host in a step, both ways together, for what is offloaded to "cpu".

    Optimizer under ZeRO-3: in each micro-batch its share of the gradients goes down and up again (to be added to, and for the norm), with the last one a copy
    in fp32 down, and its share of new weights up, cast on the host. Under ZeRO-1 and 2 the fp32 copy and the new weights, and with accumulation whole
    gradients up and down in between. Weights: the share that it brings into each gather goes up, and the new share need not, for it stays on the host.
    Read from DeepSpeed's code (stage3.py, `partition_grads`, `_offload_grad_partition_at_boundary`; stage_1_and_2.py, `async_accumulate_grad_in_cpu_via_gpu`),
    not measured: on CPUs there is no such copy.
    """
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    share, count = width * trained // world_size, len(traffic.micro_batches)
    moved = 0
    params_off = zero.get("offload_param", {}).get("device", "none") != "none"
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        through = 2 * count * share if zero.get("stage") == 3 else 2 * (count - 1) * width * trained
        moved += through + 4 * trained // world_size + (0 if params_off else share)
    if params_off:
        moved += sum(part.payload // part.ranks for part in traffic if part.what == "weights")
    return moved


def _padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple
