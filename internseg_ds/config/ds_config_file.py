"""The JSON file of a ds_config: read, and held against the keys that DeepSpeed has."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from internseg_ds.config import packaged
from internseg_ds.errors import ConfigError, reason_of, unknown_key

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
DATA_TYPES_KEYS = frozenset(("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"))


def read_ds_config(source: str | os.PathLike | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name for messages and a copy of the content. source: path of a JSON file, the name of
    one of ours (`packaged.find`), or its content.

    Raises ConfigError for a file that is not there, is no JSON, or holds no object.
    """
    if isinstance(source, Mapping):
        return "ds_config", json.loads(json.dumps(dict(source)))  # a deep copy, and a check that it is JSON
    path = packaged.find(source, packaged.DS_CONFIGS)
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"there is no ds_config {path}{packaged.near_miss(path, packaged.DS_CONFIGS)}; give one with "
            "--deepspeed_config PATH or the name of one of ours (the usual one is zero3_bf16)"
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


def check_keys(raw: dict[str, Any], name: str) -> None:
    """Raises ConfigError for keys that DeepSpeed would pass over, and sections that are none."""
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


def check_no_auto_left(section: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for an "auto" that nothing has filled."""
    for key, value in section.items():
        if value == "auto" and key != "keep_in_fp32_modules":  # the one "auto" that is DeepSpeed's own
            raise ConfigError(
                f'{key}="auto" in {where} cannot be filled from the experiment config; write a value or '
                "drop it"
            )
        if isinstance(value, Mapping):
            check_no_auto_left(value, f"{key} of {where}")


def check_deepspeed_accepts(raw: dict[str, Any], name: str) -> None:
    """DeepSpeed's own reading of the whole file, which refuses unknown keys and wrong types in most
    sections. Raises ConfigError where it does."""
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
