"""The DeepSpeed JSON: read, filled in from the experiment, and checked against it before anything is built.

In: a ds_config (path or dict) that carries only what is DeepSpeed's, and the numbers of the experiment
config, which is the one source of batch, optimizer, schedule and clipping. Out: a `DsConfig` whose `raw` dict
goes to `deepspeed.initialize` as it is. Takes no accelerator.
"""

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from internseg_ds.errors import ConfigError, counted, reason_of, unknown_key
from internseg_ds.moment_formats import OptimizerStates

if TYPE_CHECKING:
    from internseg_ds.models.repeated_blocks import RepeatedBlock

Precision = Literal["bf16", "autocast", "fp32"]

# DeepSpeed 0.19.8 ignores an unknown key at the top level silently, so the ones it reads are listed
# here.
TOP_LEVEL_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "activation_checkpointing",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "log_level",
        "comms_logger",
        "flops_profiler",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "aio",
        "checkpoint",
        "compile",
        "timers",
        "disable_python_gc",
        "disable_allgather",
        "managed_gradient_accumulation",
        "dataloader_drop_last",
        "datastates_ckpt",
    ]
)
AUTOCAST_KEYS = frozenset(("enabled", "dtype", "lower_precision_safe_modules"))
SUB_GROUP = 250_000_000
"""Elements of a process that are updated at a time where a ds_config does not say (ZeRO-3's `sub_group_size`,
or a parameter group of ZeRO-1 and 2): their fp32 gradients take 1 GB meanwhile. DeepSpeed's own
`sub_group_size` is four times as much, and made for several parameter groups."""
LEAST_BUCKET = 2**20
"""Elements of the smallest "auto" bucket: below it a collective's start costs more than its bytes."""
DATA_TYPES_KEYS = frozenset(("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"))


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
class BatchPerStep:
    """What a recipe asks for in one optimizer step: images of all processes (`engine.global_batch`), or
    micro-batches of each (`optimizer_config.cumulative_iters`); at most one of them. Neither: one micro-batch
    unless the ds_config says more."""

    images: int | None = None
    micro_batches: int | None = None


@dataclass(frozen=True)
class BackboneSizes:
    """hidden_size: width of the backbone, block: what it repeats, if anything. From these "auto" ZeRO-3 sizes
    follow, so that weights are gathered and gradients reduced block by block."""

    hidden_size: int = 1024
    block: "RepeatedBlock | None" = None


@dataclass(frozen=True)
class _Sources:
    """Names for messages: of the ds_config, and of the experiment config."""

    ds: str
    experiment: str


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
    name, raw = _read(source)
    _known_keys(raw, name)
    sources = _Sources(name, experiment)
    accumulation = _accumulation(raw, micro_batch, world_size, per_step or BatchPerStep(), sources)
    _fill_batch(raw, micro_batch, world_size, accumulation, sources)
    _must_equal(raw, "gradient_clipping", gradient_clipping, "optimizer_config.grad_clip.max_norm", sources)
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
    _no_auto_left(raw, name)
    _deepspeed_accepts(raw, name)
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


def _fill_batch(
    raw: dict[str, Any], micro_batch: int, world_size: int, accumulation: int, sources: _Sources
) -> None:
    """Raises ConfigError where the ds_config has other batch sizes."""
    _must_equal(raw, "train_micro_batch_size_per_gpu", micro_batch, "data.samples_per_gpu", sources)
    raw["gradient_accumulation_steps"] = accumulation
    product = world_size * micro_batch * accumulation
    if raw.get("train_batch_size", "auto") not in ("auto", product):
        raise ConfigError(
            f"train_batch_size={raw['train_batch_size']} is not {counted(world_size, 'process')} x "
            f"{counted(micro_batch, 'image')} x {counted(accumulation, 'accumulation step')} = {product}.\n"
            f"  from: {sources.ds}: train_batch_size; {sources.experiment}: "
            f"data.samples_per_gpu={micro_batch}\n"
            f"  fix:  drop train_batch_size from {sources.ds}, it is derived; to keep the recipe's batch set "
            f"engine.global_batch in {sources.experiment}"
        )
    raw["train_batch_size"] = product


def _check_sections(raw: Mapping[str, Any], sources: _Sources) -> None:
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


def _ours() -> Path:
    """The folder of the ds_configs that come with the project: of a checkout, the absolute path."""
    checkout = Path(__file__).parents[2] / "ds_configs"
    return checkout if checkout.is_dir() else Path("ds_configs")


def _read(source: str | os.PathLike | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "ds_config", json.loads(json.dumps(dict(source)))  # a deep copy, and a check that it is JSON
    path = Path(source)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"there is no ds_config {path} as seen from {Path.cwd()}; give one with --deepspeed_config PATH "
            f"(ours are in {_ours()}, the usual one is zero3_bf16.json)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"ds_config {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"ds_config {path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"ds_config {path} must hold one JSON object, not a {type(raw).__name__}")
    return str(path), raw


def _known_keys(raw: dict[str, Any], name: str) -> None:
    for key in raw:
        if key not in TOP_LEVEL_KEYS:
            raise unknown_key(key, TOP_LEVEL_KEYS, name)
    for section in (
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "optimizer",
        "timers",
    ):
        _is_section(raw, section, name)
    _is_section(raw.get("timers", {}), "throughput", f"timers of {name}")
    for section in ("offload_optimizer", "offload_param"):
        _is_section(raw.get("zero_optimization", {}), section, f"zero_optimization of {name}")
    for section in ("bf16", "fp16", "torch_autocast"):
        if not isinstance(enabled := raw.get(section, {}).get("enabled", False), bool):
            raise ConfigError(f"{section}.enabled={enabled!r} of {name} must be true or false")
    for section, known in (("torch_autocast", AUTOCAST_KEYS), ("data_types", DATA_TYPES_KEYS)):
        for key in raw.get(section, {}):
            if key not in known:
                raise unknown_key(key, known, f"{section} of {name}")


def _is_section(parent: dict[str, Any], key: str, name: str) -> None:
    """`null` means the same as no such key; anything else must be an object."""
    if parent.get(key, {}) is None:
        del parent[key]
    elif not isinstance(parent.get(key, {}), dict):
        raise ConfigError(f"{key} of {name} must be a section {{...}}, not {parent[key]!r}")


def _accumulation(
    raw: dict[str, Any], micro_batch: int, world_size: int, per_step: BatchPerStep, sources: _Sources
) -> int:
    """Micro-batches per optimizer step, from the experiment, else from the ds_config, else 1."""
    wanted = per_step.micro_batches
    if per_step.images is not None:
        wanted, rest = divmod(per_step.images, world_size * micro_batch)
        if rest:
            raise ConfigError(
                f"engine.global_batch={counted(per_step.images, 'image')} cannot be made of "
                f"{counted(world_size, 'process')} x {counted(micro_batch, 'image')}.\n"
                f"  from: {sources.experiment}: engine.global_batch={per_step.images}, "
                f"data.samples_per_gpu={micro_batch}\n"
                "  fix:  choose data.samples_per_gpu and the number of processes so that their product "
                f"divides {per_step.images}"
            )
    given = raw.get("gradient_accumulation_steps", "auto")
    if given == "auto":
        return wanted or 1
    if not isinstance(given, int) or given < 1:
        raise ConfigError(
            f"gradient_accumulation_steps={given!r} of {sources.ds} must be a whole number of at least 1, "
            'or "auto"'
        )
    if wanted not in (None, given):
        setting = (
            f"engine.global_batch={per_step.images}"
            if per_step.images is not None
            else "optimizer_config.cumulative_iters"
        )
        raise ConfigError(
            f"gradient_accumulation_steps={given} contradicts the {counted(wanted, 'step')} that {setting} "
            f"means for {counted(world_size, 'process')} x {counted(micro_batch, 'image')}.\n"
            f"  from: {sources.ds}: gradient_accumulation_steps; {sources.experiment}: {setting}\n"
            f'  fix:  set gradient_accumulation_steps to "auto" in {sources.ds}'
        )
    return given


def _must_equal(raw: dict[str, Any], key: str, value: Any, option: str, sources: _Sources) -> None:
    given = raw.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(
            f"{key}={given!r} contradicts {option}={value!r}.\n"
            f"  from: {sources.ds}: {key}; {sources.experiment}: {option}\n"
            f'  fix:  set {key} to "auto" in {sources.ds}; the experiment config is its one source'
        )
    raw[key] = value


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


def _optimizer_agrees(raw: dict[str, Any], optimizer: Mapping[str, Any], sources: _Sources) -> None:
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


def _no_auto_left(section: Mapping[str, Any], where: str) -> None:
    for key, value in section.items():
        if value == "auto" and key != "keep_in_fp32_modules":  # the one "auto" that is DeepSpeed's own
            raise ConfigError(
                f'{key}="auto" in {where} cannot be filled from the experiment config; write a value or '
                "drop it"
            )
        if isinstance(value, Mapping):
            _no_auto_left(value, f"{key} of {where}")


def _deepspeed_accepts(raw: dict[str, Any], name: str) -> None:
    """DeepSpeed's own reading of the whole file, which refuses unknown keys and wrong types in most
    sections."""
    from deepspeed import comm
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for key in raw["zero_optimization"]:
        if key not in known:
            raise unknown_key(key, known, f"zero_optimization of {name}")
    # as DeepSpeedConfig sees it: the processes have not met yet
    world_size = comm.get_world_size() if comm.is_initialized() else 1
    batch = raw["train_micro_batch_size_per_gpu"] * raw["gradient_accumulation_steps"] * world_size
    try:
        DeepSpeedConfig(copy.deepcopy(raw) | {"train_batch_size": batch})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))}={first['input']!r} of {name} ({error.title}): {first['msg']}"
        ) from None
    except Exception as error:  # DeepSpeed refuses with errors of many kinds
        raise ConfigError(f"DeepSpeed refuses {name}: {reason_of(error)}") from None
