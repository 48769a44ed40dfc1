"""The DeepSpeed JSON: read, filled in from the experiment, and checked against it before anything is built.

In: a ds_config (path or dict) that carries only what is DeepSpeed's, and the numbers of the experiment
config, which is the one source of batch, optimizer, schedule and clipping. Out: a `DsConfig` whose `raw` dict
goes to `deepspeed.initialize` as it is. Takes no accelerator.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from internseg_ds.config.ds_config_batch import (
    BatchPerStep,
    Sources,
    accumulation_steps,
    fill_batch,
    must_equal,
)
from internseg_ds.config.ds_config_file import (
    check_deepspeed_accepts,
    check_keys,
    check_no_auto_left,
    read_ds_config,
)
from internseg_ds.errors import ConfigError, counted
from internseg_ds.moment_formats import OptimizerStates

if TYPE_CHECKING:
    from internseg_ds.models.repeated_blocks import RepeatedBlock

Precision = Literal["bf16", "autocast", "fp32"]

SUB_GROUP = 250_000_000
"""Elements of a process that are updated at a time where a ds_config does not say (ZeRO-3's `sub_group_size`,
or a parameter group of ZeRO-1 and 2): their fp32 gradients take 1 GB meanwhile. DeepSpeed's own
`sub_group_size` is four times as much, and made for several parameter groups."""
LEAST_BUCKET = 2**20
"""Elements of the smallest "auto" bucket: below it a collective's start costs more than its bytes."""


@dataclass(frozen=True)
class DsConfig:
    """A ds_config without "auto" values that agrees with its experiment. Batch sizes are in images."""

    raw: dict[str, Any]
    source: str
    stage: int
    precision: Precision
    micro_batch: int
    accumulation: int
    world_size: int
    cpu_adam: bool
    optimizer_states: OptimizerStates
    bf16_master: bool
    """Whether the weights that the optimizer updates are bf16 (`bf16_master_weights_and_grads`)."""

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.accumulation

    @property
    def param_dtype(self) -> torch.dtype:
        """dtype in which ZeRO stores the parameters that modules compute with (the master weights are fp32
        in every mode without `bf16_master`)."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def without_leaf_modules(self) -> "DsConfig":
        """The same with DeepSpeed's hooks on each layer."""
        zero = {**self.raw["zero_optimization"], "leaf_module": {"classes": []}}
        return replace(self, raw={**self.raw, "zero_optimization": zero})


@dataclass(frozen=True)
class BackboneSizes:
    """hidden_size: width of the backbone, block: what it repeats, if anything. From these "auto" ZeRO-3 sizes
    follow, so that weights are gathered and gradients reduced block by block."""

    hidden_size: int = 1024
    block: "RepeatedBlock | None" = None


def resolve_ds_config(
    source: str | os.PathLike | Mapping[str, Any],
    *,
    experiment: str,
    micro_batch: int,
    world_size: int,
    optimizer: Mapping[str, Any],
    per_step: BatchPerStep | None = None,
    gradient_clipping: float = 0.0,
    sizes: BackboneSizes | None = None,
    optimizer_states: OptimizerStates = "fp32",
) -> DsConfig:
    """Fills the "auto" values of a ds_config from the experiment and refuses what contradicts it.

    source: path of a JSON file, or its content as a dict. experiment: path of the config, for messages.
    micro_batch: images per process and forward. optimizer: the experiment's section (type, lr, ...).
    optimizer_states: its `engine.optimizer_states`.

    Raises ConfigError for an unreadable file, an unknown key, fp16, a contradiction in batch, clipping,
    optimizer or the formats of its state.
    """
    name, raw = read_ds_config(source)
    check_keys(raw, name)
    sources = Sources(name, experiment)
    accumulation = accumulation_steps(raw, micro_batch, world_size, per_step or BatchPerStep(), sources)
    fill_batch(raw, micro_batch, world_size, accumulation, sources)
    must_equal(raw, "gradient_clipping", gradient_clipping, "optimizer_config.grad_clip.max_norm", sources)
    precision = _precision(raw, name)
    _optimizer_agrees(raw, optimizer, sources)
    _check_sections(raw, sources)
    zero = raw.setdefault("zero_optimization", {"stage": 0})
    _check_zero(zero, world_size, name)
    bf16_master = _bf16_master(raw, name, precision, optimizer_states)
    _fill_zero3_sizes(zero, sizes or BackboneSizes())
    # DeepSpeed's clock of samples per second waits for the device at each forward and step; the records have
    # that figure from a clock that does not
    raw.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    check_no_auto_left(raw, name)
    check_deepspeed_accepts(raw, name)
    # DeepSpeed knows Adam and its relatives by their classes; ours, and others, run unchanged in fp32
    # partitions, so they are allowed without a key for it
    if _class_name(optimizer.get("type", "AdamW")) in ("Adam", "AdamW", "Muon"):
        raw["zero_allow_untested_optimizer"] = True
    raw.setdefault("zero_allow_untested_optimizer", True)
    offloaded = _offloads_optimizer(raw)
    return DsConfig(
        raw=raw,
        source=name,
        stage=zero.get("stage", 0),
        precision=precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        world_size=world_size,
        cpu_adam=offloaded and raw.get("zero_force_ds_cpu_optimizer", True),
        optimizer_states=optimizer_states,
        bf16_master=bf16_master,
    )


def _offloads_optimizer(raw: Mapping[str, Any]) -> bool:
    return raw["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none"


def _bf16_master(
    raw: Mapping[str, Any], name: str, precision: Precision, optimizer_states: OptimizerStates
) -> bool:
    """Whether DeepSpeed holds no fp32 weights. Raises ConfigError where the optimizer's formats cannot be
    with the rest of the ds_config.

    DeepSpeed 0.19.8 (runtime/base_optimizer.py, `_configure_master_weights`) wants `bf16_optimizer_states`
    too where nothing is offloaded. ZeRO-1 with fp32 gradients is another optimizer of its own
    (runtime/bf16_optimizer.py), whose master weights are fp32 whatever the ds_config says.
    """
    keys = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    master, states = (raw.get("bf16", {}).get(key, False) for key in keys)
    setting = f"engine.optimizer_states={optimizer_states!r}"
    if optimizer_states != "fp32" and _offloads_optimizer(raw):
        raise ConfigError(
            f"{setting} cannot work with offload_optimizer of {name}, whose Adam on the host keeps fp32 "
            'moments; drop offload_optimizer, or leave engine.optimizer_states at "fp32"'
        )
    if not master and not states:
        return False
    if not (master and states and precision == "bf16"):
        raise ConfigError(
            f"weights in bf16 alone need bf16.enabled, bf16.{keys[0]} and bf16.{keys[1]} in {name}, all "
            "three true; set them, or drop the last two"
        )
    if optimizer_states == "fp32":
        raise ConfigError(
            f"bf16.{keys[0]} of {name} cannot work with {setting}: weights in bf16 must be rounded "
            "stochastically, or they lose most updates; set engine.optimizer_states to "
            f'"bf16" or "8bit", or drop bf16.{keys[0]}'
        )
    accumulated = raw.get("data_types", {}).get("grad_accum_dtype")
    if raw["zero_optimization"].get("stage", 0) == 1 and accumulated not in (None, "bf16", "bfloat16"):
        raise ConfigError(
            f"data_types.grad_accum_dtype={accumulated!r} of {name} has ZeRO-1 keep fp32 weights, against "
            f"bf16.{keys[0]}; drop one of them, or use ZeRO-2"
        )
    return True


def _check_sections(raw: Mapping[str, Any], sources: Sources) -> None:
    """Raises ConfigError for sections that would do what the engine does."""
    if "scheduler" in raw:
        raise ConfigError(
            f"{sources.ds} has a scheduler section, but the learning-rate schedule comes from lr_config in "
            f"{sources.experiment}; drop it from {sources.ds}"
        )
    if "writer" in (raw.get("checkpoint") or {}):
        raise ConfigError(
            f"checkpoint.writer of {sources.ds} asks for DeepSpeed's fast or decoupled writer, "
            "whose files are not on disk when a save returns; drop it"
        )


def _check_zero(zero: Mapping[str, Any], world_size: int, name: str) -> None:
    """Raises ConfigError for a stage that is no number, and for nodes that do not divide the processes."""
    if not isinstance(zero.get("stage", 0), int):
        raise ConfigError(f"zero_optimization.stage={zero['stage']!r} of {name} must be 1, 2 or 3")
    node = zero.get("zero_hpz_partition_size", 1)
    if not isinstance(node, int) or node < 1 or world_size % node:
        processes = counted(world_size, "process")
        raise ConfigError(
            f"zero_hpz_partition_size={node!r} of {name} must be the number of GPUs of a node, "
            f"which divides the {processes}"
        )


def _precision(raw: dict[str, Any], name: str) -> Precision:
    if raw.get("fp16", {}).get("enabled", False):
        raise ConfigError(
            f"fp16 is enabled in {name}, but activations of large backbones leave fp16's range; use "
            f'"bf16": {{"enabled": true}}'
        )
    raw.pop("fp16", None)
    if not raw.get("bf16", {}).get("check_grad_overflow", True):
        raise ConfigError(
            f"bf16.check_grad_overflow is false in {name}, but steps whose gradient is not finite are "
            "skipped here; drop it"
        )
    bf16, autocast = (raw.get(section, {}).get("enabled", False) for section in ("bf16", "torch_autocast"))
    if bf16 and autocast:
        raise ConfigError(
            f"bf16 and torch_autocast are both enabled in {name}; bf16 stores bf16 weights, torch_autocast "
            "keeps them fp32: disable one"
        )
    if autocast and raw["torch_autocast"].get("dtype", "bfloat16") not in ("bfloat16", "bf16"):
        raise ConfigError(
            f'torch_autocast.dtype={raw["torch_autocast"]["dtype"]!r} in {name}; write "bfloat16"'
        )
    return "bf16" if bf16 else "autocast" if autocast else "fp32"


def _optimizer_agrees(raw: dict[str, Any], optimizer: Mapping[str, Any], sources: Sources) -> None:
    """An optimizer section in the ds_config may repeat the experiment's values, not change them; it is
    dropped."""
    section = raw.pop("optimizer", None)
    if section is None or section == "auto":
        return
    pairs = {"type": section.get("type", "auto")} | (section.get("params") or {})
    for key, value in pairs.items():
        ours = optimizer.get(key)
        same = value == "auto" or (
            _class_name(value).lower() == _class_name(ours).lower()
            if key == "type"
            else _plain(value) == _plain(ours)
        )
        if not same:
            raise ConfigError(
                f"the optimizer is named twice with different values: {key}={value!r} and {key}={ours!r}.\n"
                f"  from: {sources.ds}: optimizer; {sources.experiment}: optimizer\n"
                f"  fix:  drop the optimizer section from {sources.ds}"
            )


def _class_name(kind: Any) -> str:
    """Of an optimizer that is named by its class ("AdamW") or by its path ("torch.optim.AdamW")."""
    return str(kind).rpartition(".")[2]


def _plain(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, (list, tuple)) else value


def _fill_zero3_sizes(zero: dict[str, Any], backbone: BackboneSizes) -> None:
    """Vectors of the width stay whole on each rank, an update takes `SUB_GROUP` elements at a time. What is
    left of a block goes into one bucket: one gather, and one reduction, of a whole block.

    leaf_module "auto": DeepSpeed's hooks sit on blocks and not on each of their layers. Without a block:
    sizes as transformers derives them.
    """
    hidden_size, block = backbone.hidden_size, backbone.block
    if zero.get("stage") == 3 and not any(
        zero.get(key, {}).get("device") == "nvme" for key in ("offload_optimizer", "offload_param")
    ):
        zero.setdefault("sub_group_size", SUB_GROUP)  # buffers for NVMe are made for the larger one
    if zero.get("stage3_param_persistence_threshold") == "auto":
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
    kept = zero.get("stage3_param_persistence_threshold", 100_000)
    if block is None:
        sizes = {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": hidden_size * hidden_size * 9 // 10,
        }
    else:
        partitioned = [size for size in block.sizes if not isinstance(kept, (int, float)) or size > kept]
        sizes = {"reduce_bucket_size": sum(block.sizes), "stage3_prefetch_bucket_size": sum(partitioned)}
    for key, size in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = max(size, LEAST_BUCKET)
    if zero.get("leaf_module") == "auto":
        zero["leaf_module"] = {"classes": [block.class_name] if block else []}
