"""Bytes that the processes of a run exchange in one optimizer step, collective by collective, as DeepSpeed
0.19.8 does it.

Sources: Rajbhandari et al., "ZeRO" (2020), section 7, for what has to be exchanged; Wang et al., "ZeRO++"
(2023), section 3.2, for hpZ; and DeepSpeed's own code where it does otherwise: ZeRO-1 and ZeRO-2 reduce each
bucket by an all-reduce and keep their share, which sends twice the bytes of a reduce-scatter.
`tests/planning/test_collectives_counted.py` compares these numbers with the bytes of real runs.
`docs/scaling.md` derives them.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from torch import nn

from internseg_ds.errors import ConfigError
from internseg_ds.planning.flops import Use
from internseg_ds.planning.gathered_weights import GatherSettings, gathers, leaves, persistent
from internseg_ds.planning.zero_memory import elements
from internseg_ds.planning.zero_settings import ZeroSettings, trained_elements, trained_sizes
from internseg_ds.zero_partition import padded

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
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
    """Some collectives of one kind among `ranks` processes. payload: bytes of the whole tensors: after an
    all-gather, before a reduction; of an all-to-all, of the tensor of one process."""

    kind: Kind
    what: Literal["weights", "gradients", "batch norm", "matrices"]
    payload: int
    calls: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each process sends around a ring (Patarasuk and Yuan, 2009): a share of 1 / ranks to
        ranks - 1 neighbours, twice for an all-reduce. An all-to-all sends as much, to each process its own."""
        return (2 if self.kind == "all_reduce" else 1) * self.payload * (self.ranks - 1) / self.ranks

    def sent_by_link(self, per_node: int) -> tuple[float, float]:
        """`sent`, split into what stays within a node of `per_node` processes and what leaves it.

        Each node has as many rings as GPUs, and each ring leaves it through another GPU's adapter: of what a
        GPU sends, 1 / per_node goes out.
        """
        if self.ranks <= per_node:
            return self.sent, 0.0
        if self.kind == "all_to_all":
            outside = (self.ranks - per_node) / (self.ranks - 1)
            return self.sent * (1 - outside), self.sent * outside
        return self.sent * (per_node - 1) / per_node, self.sent / per_node


@dataclass(frozen=True)
class Traffic:
    """One optimizer step: what goes on during each micro-batch, and what follows the last one."""

    micro_batches: tuple[tuple[Collective, ...], ...]
    after: tuple[Collective, ...]

    def __iter__(self) -> Iterator[Collective]:
        for part in (*self.micro_batches, self.after):
            yield from part

    def sent_by_link(self, per_node: int) -> tuple[float, float]:
        """Bytes that each process sends within its node, and to other nodes."""
        links = [part.sent_by_link(per_node) for part in self]
        return sum(within for within, _ in links), sum(between for _, between in links)


def check_known(zero: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting whose traffic is not modelled."""
    for key, known in UNKNOWN.items():
        if zero.get(key, known) != known:
            raise ConfigError(
                f"zero_optimization.{key}={zero[key]!r} changes what is sent in a way that the estimate "
                "does not know; estimate without it"
            )
    for key, value in zero.get("leaf_module", {}).items():
        if key != "classes" and value:
            raise ConfigError(
                f"zero_optimization.leaf_module.{key}={value!r} changes what is gathered in a way that the "
                "estimate does not know; name classes alone, or estimate without it"
            )


def step_traffic(
    model: nn.Module,
    settings: ZeroSettings,
    group_sizes: Sequence[int],
    uses: Sequence[Use],
    matrices: Sequence[tuple[int, int]] = (),
) -> Traffic:
    """model: on the meta device. group_sizes: elements of each parameter group of the optimizer. uses: of a
    micro-batch, by `training_pass`. matrices: rows and columns of those that Muon trains.

    Left out: the norms of the gradients and the losses that are logged, some hundred bytes a step, and under
    ZeRO-1 and 2 Muon's matrices at the border of two ranks. Raises ConfigError for a setting whose traffic is
    not modelled.
    """
    check_known(settings.zero)
    if settings.stage == 3:
        traffic = _zero3_traffic(model, settings, uses)
        return replace(traffic, after=(*traffic.after, *_matrix_traffic(settings, matrices)))
    width = settings.bytes_per_weight
    ranks = settings.world_size
    norms = batch_norm_collectives(model, ranks)
    sizes = trained_sizes(model)
    gradients = Collective(
        "all_reduce", "gradients", width * sum(sizes), buckets(sizes, settings.reduce_bucket), ranks
    )
    # ZeRO-0 and ZeRO-1 add up whole gradients, and reduce them with those of the last micro-batch
    earlier = (*norms, gradients) if settings.stage == 2 else tuple(norms)
    # stage_1_and_2.py aligns the partitions of a group to `nccl_start_alignment_factor` = 2 elements
    padded_groups = sum(padded(size, 2 * ranks) for size in group_sizes)
    weights = Collective("all_gather", "weights", width * padded_groups, len(group_sizes), ranks)
    return Traffic(
        (earlier,) * (settings.accumulation - 1) + ((*norms, gradients),),
        (weights,) if settings.stage else (),
    )


def _matrix_traffic(settings: ZeroSettings, matrices: Sequence[tuple[int, int]]) -> list[Collective]:
    """Muon's exchange in fp32, there and back, for each sub-group (optimization/matrix_exchange.py)."""
    if not matrices:
        return []
    share = elements(matrices) // settings.world_size
    sub_groups = -(-share // settings.elements_updated_at_once(elements(matrices)))
    return [Collective("all_to_all", "matrices", 2 * 4 * share, 2 * sub_groups, settings.world_size)]


def _zero3_traffic(model: nn.Module, settings: ZeroSettings, uses: Sequence[Use]) -> Traffic:
    width = settings.bytes_per_weight
    ranks = settings.world_size
    gather_settings = GatherSettings.of(settings.zero)
    norms = batch_norm_collectives(model, ranks)
    scattered = Collective(
        "reduce_scatter",
        "gradients",
        width * sum(padded(size, ranks) for size in trained_sizes(model)),
        buckets(reduced_together(model, gather_settings), settings.reduce_bucket),
        ranks,
    )
    # bytes of each parameter that an all-gather brings together
    payloads = {name: width * padded(param.numel(), ranks) for name, param in model.named_parameters()}
    first = _gathered(gathers(model, uses, gather_settings).calls, payloads, settings)
    others = _gathered(
        gathers(model, uses, gather_settings, first=False).calls,
        payloads,
        settings,
        set(payloads) if settings.node_size > 1 else set(),
    )
    kept = [name for name in persistent(model, gather_settings) if model.get_parameter(name).requires_grad]
    after = Collective("all_gather", "weights", sum(payloads[name] for name in kept), len(kept), ranks)
    return Traffic(
        ((*norms, *first, scattered), *((*norms, *others, scattered),) * (settings.accumulation - 1)),
        (after,),
    )


def _gathered(
    calls: Sequence[tuple[str, ...]],
    payloads: Mapping[str, int],
    settings: ZeroSettings,
    secondary: AbstractSet[str] = frozenset(),
) -> list[Collective]:
    """The gathers of a micro-batch by how far they reach. payloads: bytes of each parameter. secondary:
    parameters that hpZ has a second partition of, within each node, when the micro-batch begins.

    It makes one when it first releases a parameter, and drops all of them at each step.
    """
    on_node = set(secondary)
    between, within = _Tally(), _Tally()
    for params in calls:
        within.add([payloads[name] for name in params if name in on_node])
        between.add([payloads[name] for name in params if name not in on_node])
        if settings.node_size > 1:
            on_node.update(params)
    return [
        Collective("all_gather", "weights", tally.payload, tally.calls, ranks)
        for tally, ranks in ((between, settings.world_size), (within, settings.node_size))
        if tally.calls
    ]


@dataclass
class _Tally:
    """Collectives counted so far."""

    payload: int = 0
    calls: int = 0

    def add(self, payloads: Sequence[int]) -> None:
        """One collective of so many bytes per parameter; none where there is no parameter."""
        self.payload += sum(payloads)
        self.calls += bool(payloads)


def batch_norm_collectives(model: nn.Module, world_size: int) -> list[Collective]:
    """Of one micro-batch. Each nn.SyncBatchNorm of c channels exchanges 2 c + 1 numbers forward, and 2 c
    backward, in fp32."""
    channels = [module.num_features for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    if not channels:
        return []
    forward = sum(2 * c + 1 for c in channels)
    return [
        Collective("all_gather", "batch norm", 4 * forward * world_size, len(channels), world_size),
        Collective("all_reduce", "batch norm", 4 * sum(2 * c for c in channels), len(channels), world_size),
    ]


def reduced_together(model: nn.Module, settings: GatherSettings) -> list[int]:
    """Sizes of the gradients, the first to be reduced last. A leaf module's come together, those of parameter
    groups without decay (vectors) first."""
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
    """How many reductions gradients of these sizes take: a bucket is sent when the next gradient, the last
    parameter's first, would not fit in."""
    full, held = 0, 0
    for size in reversed(sizes):
        if held and held + size > limit:
            full, held = full + 1, 0
        held += size
    return full + 1 if held else full


def host_bytes(model: nn.Module, settings: ZeroSettings, traffic: Traffic) -> int:
    """Bytes that one process moves between its GPU and the host in a step, both directions together, for what
    is offloaded to "cpu".

    Optimizer under ZeRO-3: in each micro-batch its share of the gradients goes down and up again (to be added
    to, and for the norm), with the last one a copy in fp32 down, and its share of new weights up, cast on the
    host. Under ZeRO-1 and 2 the fp32 copy and the new weights, and with accumulation whole gradients up and
    down in between. Weights: the share that it brings into each gather goes up, and the new share need not,
    for it stays on the host. Read from DeepSpeed's code (stage3.py, `partition_grads`,
    `_offload_grad_partition_at_boundary`; stage_1_and_2.py, `async_accumulate_grad_in_cpu_via_gpu`), not
    measured: on CPUs there is no such copy.
    """
    trained = trained_elements(model)
    width = settings.bytes_per_weight
    share = width * trained // settings.world_size
    count = len(traffic.micro_batches)
    moved = 0
    if settings.optimizer_offloaded:
        in_between = 2 * count * share if settings.stage == 3 else 2 * (count - 1) * width * trained
        new_weights = 0 if settings.weights_offloaded else share
        moved += in_between + 4 * trained // settings.world_size + new_weights
    if settings.weights_offloaded:
        moved += sum(part.payload // part.ranks for part in traffic if part.what == "weights")
    return moved
