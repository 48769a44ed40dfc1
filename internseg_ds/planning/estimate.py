"""What one experiment needs under one ds_config on one cluster: memory, traffic, time, disk. A comparison of
ds_configs is several of these estimates, and so is a table over clusters of several sizes.

In: an `Estimator`, ds_configs, clusters. Out: `Estimate`s. Takes no accelerator and reads no data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.config.experiment import Experiment
from internseg_ds.errors import ConfigError
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.planning.auto_checkpointing import as_it_will_train
from internseg_ds.planning.collectives import host_bytes, step_traffic
from internseg_ds.planning.devices import Cluster, Device
from internseg_ds.planning.estimator import DsConfigSource, Estimator
from internseg_ds.planning.flops import TrainingPass
from internseg_ds.planning.memory_estimate import MemoryEstimate, Platform
from internseg_ds.planning.step_time import Assumptions, MatmulKind, StepTime, StepWork, step_time
from internseg_ds.planning.zero_memory import Part
from internseg_ds.planning.zero_settings import ZeroSettings, total_elements, trained_elements


@dataclass(frozen=True)
class StepEstimate:
    """One optimizer step. within_node, between_nodes: bytes that each GPU sends. hours: of the schedule, or of
    as many images as it sees where the recipe's batch cannot be kept; None where it counts epochs."""

    time: StepTime
    within_node: float
    between_nodes: float
    images_per_s: float
    hours: float | None


@dataclass(frozen=True)
class Estimate:
    """One experiment under one ds_config on one cluster. ds: the ds_config, with micro-batch and accumulation.
    image: the work of one training image. crop: its height and width in pixels. keeps_batch: whether the
    recipe's batch can be kept. frozen: share of the weights that do not train. step: None where its time is not
    modelled, and `untimed` says why."""

    experiment: Experiment
    ds: DsConfig
    cluster: Cluster
    assumed: Assumptions
    checkpointing: CheckpointingPolicy
    keeps_batch: bool
    crop: tuple[int, int]
    frozen: float
    image: TrainingPass
    memory: MemoryEstimate
    step: StepEstimate | None
    untimed: str = ""


def estimate(
    estimator: Estimator,
    ds_config: DsConfigSource,
    cluster: Cluster,
    assumed: Assumptions,
    *,
    evaluates: bool = True,
) -> Estimate:
    """evaluates: whether the memory is that of a run that does.

    Where `engine.recomputation` is "auto", it is of the activation checkpointing that would be chosen there.
    Raises ConfigError where `resolve_ds_config` does for this number of processes, and for settings whose
    memory is not modelled.
    """
    platform = Platform.of_cluster(cluster)
    ds, keeps_batch = estimator.resolve(ds_config, cluster.world_size)
    estimator = as_it_will_train(estimator, ds, platform)
    step: StepEstimate | None = None
    untimed = ""
    try:
        step = estimate_step(estimator, ds, cluster, assumed)
    except ConfigError as error:
        untimed = str(error)
    return Estimate(
        estimator.experiment,
        ds,
        cluster,
        assumed,
        checkpointing=estimator.checkpointing,
        keeps_batch=keeps_batch,
        crop=estimator.crop,
        frozen=1 - trained_elements(estimator.model) / total_elements(estimator.model),
        image=estimator.training_pass,
        memory=estimator.memory(ds, platform, evaluates=evaluates),
        step=step,
        untimed=untimed,
    )


def estimate_step(estimator: Estimator, ds: DsConfig, cluster: Cluster, assumed: Assumptions) -> StepEstimate:
    """Of the activation checkpointing that the estimator's model has. Raises ConfigError for settings whose
    time or traffic is not modelled."""
    experiment = estimator.experiment
    if experiment.engine.backbone_dtype == "float32":
        raise ConfigError(
            "engine.backbone_dtype='float32' has no estimate of its time: the times are of a backbone that "
            "computes in bfloat16; drop it"
        )
    if ds.precision == "fp32":
        raise ConfigError(
            f"{ds.source} trains in fp32, whose time the estimate does not know; enable bf16 or "
            "torch_autocast"
        )
    settings = ZeroSettings.of(ds)
    compiled = experiment.engine.compile and settings.hooks_on_blocks
    float8 = _multiplies_float8(experiment.engine, ds, cluster.device)
    image = estimator.training_pass
    traffic = step_traffic(
        estimator.model, settings, estimator.group_sizes(ds), image.uses, estimator.matrices
    )
    work = StepWork(
        image,
        ds.micro_batch,
        traffic,
        trained=sum(estimator.setting_sizes),
        host_bytes=host_bytes(estimator.model, settings, traffic),
        heads=heads_matmul(experiment.engine),
        matrices=estimator.matrices,
        blocks=estimator.block_work if compiled or float8 else None,
        compiled=compiled,
        float8=float8,
        compiled_update=experiment.engine.compile,
    )
    time = step_time(work, settings, cluster, assumed)
    within_node, between_nodes = traffic.sent_by_link(cluster.per_node)
    return StepEstimate(
        time,
        within_node,
        between_nodes,
        images_per_s=ds.global_batch / time.total,
        hours=_hours(experiment, ds, time.total),
    )


def _multiplies_float8(options: EngineOptions, ds: DsConfig, device: Device) -> bool:
    """Raises ConfigError where it is asked for and cannot be had."""
    if options.matmul_dtype != "float8":
        return False
    asked = "engine.matmul_dtype='float8'"
    if device.float8 is None:
        raise ConfigError(f"{asked} is not for the {device.name}, which does not multiply float8 (e4m3)")
    if ds.precision != "bf16":
        raise ConfigError(f"{asked} needs bf16 weights, and {ds.source} trains under autocast")
    return True


def _hours(experiment: Experiment, ds: DsConfig, step_s: float) -> float | None:
    """For the images of the whole schedule; None where it counts epochs, since no data set is read here."""
    if experiment.counts_epochs:
        return None
    images = experiment.max_steps * (experiment.engine.global_batch or ds.global_batch)
    return images / ds.global_batch * step_s / 3600


def heads_matmul(options: EngineOptions) -> MatmulKind:
    """What a GPU multiplies the heads' matrices in."""
    if options.heads_dtype == "bfloat16":
        return "bf16"
    return "tf32" if options.fp32_matmul == "tf32" else "fp32"


def compare(
    estimator: Estimator, ds_configs: Sequence[Path], cluster: Cluster, assumed: Assumptions
) -> dict[Path, Estimate | str]:
    """An estimate for each ds_config, or the error message where it cannot be used or estimated there."""
    found: dict[Path, Estimate | str] = {}
    for path in ds_configs:
        try:
            found[path] = estimate(estimator, path, cluster, assumed)
        except ConfigError as error:
            found[path] = str(error).splitlines()[0]
    return found


def estimate_scaling(
    estimator: Estimator, ds_config: DsConfigSource, clusters: Sequence[Cluster], assumed: Assumptions
) -> list[Estimate]:
    """An estimate for each cluster, all with a time; memory is without evaluation. Raises ConfigError where
    `estimate` and `estimate_step` do."""
    found = []
    for cluster in clusters:
        one = estimate(estimator, ds_config, cluster, assumed, evaluates=False)
        if one.step is None:
            raise ConfigError(one.untimed)
        found.append(one)
    return found


DDP = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 0}}
"""Plain data parallelism as a ds_config: fp32 weights, gradients and moments, whole in each process."""


def without_zero(estimator: Estimator, cluster: Cluster) -> MemoryEstimate:
    """The memory of a process under plain data parallelism (DDP), with the backbone in bf16 under autocast.
    Raises ConfigError for settings that are ZeRO's alone."""
    platform = Platform.of_cluster(cluster)
    ds, _ = estimator.resolve(DDP, cluster.world_size)
    found = as_it_will_train(estimator, ds, platform).memory(ds, platform)
    # DDP's buckets, as mmcv builds it, are a second copy of the gradients
    buckets = Part("communication buckets", 4 * trained_elements(estimator.model))
    return replace(found, others=(*found.others, buckets))


def whole_or_partitioned(
    found: Mapping[Path, Estimate | str],
) -> list[tuple[Path, Estimate, StepEstimate]] | None:
    """Where most weights are frozen: the fastest ds_config of ZeRO-1, which keeps them whole on each GPU, and
    the fastest of ZeRO-3, which gathers them in each forward pass, whether they fit or not; neither offloads.
    None where few are frozen, or one of the two is missing."""
    chosen: list[tuple[Path, Estimate, StepEstimate]] = []
    for stage in (1, 3):
        timed = [
            (path, one, one.step)
            for path, one in found.items()
            if not isinstance(one, str)
            and one.step is not None
            and one.ds.stage == stage
            and one.frozen > 0.5
            and not (ZeroSettings.of(one.ds).weights_offloaded or ZeroSettings.of(one.ds).optimizer_offloaded)
        ]
        if not timed:
            return None
        chosen.append(min(timed, key=lambda entry: (entry[2].time.total, entry[1].memory.peak)))
    return chosen


def fastest(found: Mapping[Path, Estimate | str]) -> Path | None:
    """The ds_config that fits and takes least time, None where none has a time. Of those that take as long,
    to two digits: first without offloading, then in bf16, on one GPU, where nothing is divided, the lower stage,
    then the one that leaves more memory."""
    best: tuple[tuple[float, bool, bool, int, int], Path] | None = None
    for path, one in found.items():
        if isinstance(one, str) or not one.memory.fits or one.step is None:
            continue
        rank = (
            float(f"{one.step.time.total:.2g}"),
            one.memory.state_on_host > 0,
            one.ds.precision != "bf16",
            one.ds.stage if one.cluster.world_size == 1 else 0,
            one.memory.peak,
        )
        if best is None or rank < best[0]:
            best = rank, path
    return best[1] if best is not None else None
