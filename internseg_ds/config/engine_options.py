"""The settings of this engine, `engine = dict(...)` of a config: their types, defaults and limits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from internseg_ds.config.tuning_options import read_tuning
from internseg_ds.errors import ConfigError, unknown_key
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.models.tuning import TuningMode
from internseg_ds.moment_formats import OptimizerStates

LEAST_IO_TIMEOUT = 10.0
"""Less would end runs that only build their model."""


@dataclass(frozen=True)
class EngineOptions:
    """The config's own section for this engine, `engine = dict(...)`; a published file without it gets these
    defaults."""

    global_batch: int | None = None
    """Images per optimizer step, whatever the number of processes; the gradient accumulation is derived from
    it. None: no accumulation."""
    backbone_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype in which the backbone computes: "bfloat16", "float32", or "auto": bfloat16 where the hardware
    multiplies it natively, else float32."""
    heads_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the heads compute: "float32" (on a GPU as fp32_matmul says), or "bfloat16", with norms,
    class scores and losses in float32."""
    fp32_matmul: Literal["tf32", "ieee"] = "tf32"
    """How a GPU multiplies fp32 matrices and computes fp32 convolutions: "tf32" (10 bits of mantissa, on
    tensor cores, some 8 times as fast), or "ieee" (all 23 bits). Nothing on CPUs."""
    matmul_dtype: Literal["bfloat16", "float8"] = "bfloat16"
    """dtype of the operands in the matrix products of the backbone's blocks, where the backbone computes in
    bfloat16: "float8" multiplies e4m3 matrices, scaled row by row in every pass (GPUs from Ada and Hopper on);
    gradients of weights, attention and everything else stay bfloat16, and weights as they are."""
    recomputation: CheckpointingPolicy | Literal["auto", "config"] = "auto"
    """Activation checkpointing of the backbone: "auto" (by the plan of the run's memory, the one that
    recomputes least and fits; the config's with_cp is permission, not an order), "config" (as with_cp says:
    every block or none), "none", "blocks" (every block), k (every k-th block), or "all_but_matmuls" (each
    block keeps the results of matrix products and attention, and computes the rest again). No choice changes
    a loss or a gradient."""
    compile: bool = False
    """Compile the backbone's repeated block with torch.compile: once for all blocks of a kind, in the first step
    and the first evaluation, some minutes in all. Losses are equal within rounding. Under ZeRO-3 for hooks on
    blocks only ("leaf_module": "auto" in the ds_config). With optimizer_states of fewer bits, their conversions
    in the optimizer's step, too. What cannot be compiled runs as it is, and the log says why."""
    evaluate_before: bool = False
    """Evaluate once before the first step, to see what training starts from."""
    evaluation_weights: Literal["auto", "whole", "partitioned"] = "auto"
    """How a model that ZeRO-3 has partitioned is evaluated: "whole" from a copy of the weights on each rank,
    "partitioned" layer by layer, all ranks together, "auto" from a copy where there is room for it."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, 0.999 say; it is evaluated in their place, and
    saved beside them. None: no average."""
    optimizer_states: OptimizerStates = "fp32"
    """In what Adam and AdamW hold their moments: "fp32" (8 bytes a parameter), "bf16" (4) or "8bit" (2),
    these two rounded stochastically; without offload_optimizer."""
    background_save: bool = False
    """Write checkpoints while the training goes on, from a copy in host memory."""
    checksums: bool = True
    """Hold checkpoints and weights that are read against the checksums that were noted when they were
    written."""
    io_timeout: float = 3600.0
    """Seconds in which no rank makes progress in building, loading or saving, after which the run ends, as
    where a network disk does not answer; 0: any."""
    max_data_faults: int = 0
    """Training images that may be damaged: each is named, and another takes its place. One more ends the run;
    by default, the first."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a loss or a gradient that is not finite; that many end the
    run."""
    weights_may_differ: tuple[str, ...] = ()
    """Prefixes of names that the weights a run starts from may have too many, too few, or of another shape
    (other classes); any other difference is an error."""
    freeze: tuple[str, ...] = ()
    """Names of modules (backbone.layer1, or backbone for all of it) and parameters that do not train. A
    module that is named runs as in an evaluation: its batch norms use the statistics that they start with,
    and keep them, and it drops nothing."""
    tune: TuningMode = "all"
    """What of the backbone trains: "all"; "head": nothing of it, only necks and heads; dict(last_blocks=N): its
    last N blocks and what follows them; dict(lora=dict(rank=16, alpha=None, dropout=0, targets=None)):
    low-rank adapters in its blocks (docs/tuning.md)."""
    peak_tflops: float | None = None
    """Peak of matrix products in the backbone's compute dtype, in TFLOP/s per device, which mfu and hfu are
    relative to. None: measured at the start on GPUs; on CPUs there are no mfu and hfu then."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value of another type, or outside of its limits."""
        for name, what in LISTS_OF_NAMES.items():
            names = getattr(self, name)
            if not isinstance(names, (list, tuple)) or not all(isinstance(part, str) for part in names):
                raise ConfigError(f"engine.{name}={names!r} must be a list of {what}")
            object.__setattr__(self, name, tuple(names))
        object.__setattr__(self, "tune", read_tuning(self.tune))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"engine.{name}={getattr(self, name)!r} is none of {', '.join(map(repr, choices))}"
                )
        for name in ("compile", "evaluate_before", "background_save", "checksums"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"engine.{name}={getattr(self, name)!r} must be True or False")
        if self.global_batch is not None:
            whole_number(self.global_batch, "engine.global_batch", least=1)
        whole_number(self.max_data_faults, "engine.max_data_faults", least=0)
        whole_number(self.max_skipped_steps, "engine.max_skipped_steps", least=1)
        self._check_real_numbers()

    def _check_real_numbers(self) -> None:
        if self.ema is not None and not (isinstance(self.ema, float) and 0 < self.ema < 1):
            raise ConfigError(
                f"engine.ema={self.ema!r} must be a number between 0 and 1, such as 0.999, or None"
            )
        limit = self.io_timeout
        if not _is_number(limit) or not (limit == 0 or LEAST_IO_TIMEOUT <= limit < math.inf):
            raise ConfigError(
                f"engine.io_timeout={limit!r} must be at least {LEAST_IO_TIMEOUT:g} seconds, or 0 for no "
                "limit; 3600 is the usual one"
            )
        peak = self.peak_tflops
        if peak is not None and not (_is_number(peak) and 0 < peak < math.inf):
            raise ConfigError(
                f"engine.peak_tflops={peak!r} must be a number of TFLOP/s per device above 0, "
                "such as 989 for an H100 in bf16, or None to measure it"
            )


CHOICES = {
    "backbone_dtype": ("auto", "bfloat16", "float32"),
    "heads_dtype": ("float32", "bfloat16"),
    "fp32_matmul": ("tf32", "ieee"),
    "matmul_dtype": ("bfloat16", "float8"),
    "evaluation_weights": ("auto", "whole", "partitioned"),
    "optimizer_states": ("fp32", "bf16", "8bit"),
}
"""Settings with few values; `recomputation` is checked where the backbone's blocks are known
(`distributed.construction`)."""
LISTS_OF_NAMES = {
    "weights_may_differ": "prefixes of names",
    "freeze": "names of modules and parameters, such as ['backbone']",
}
"""Settings that are lists of strings, and what these are."""


def read_options(section: Mapping[str, Any], path: str) -> EngineOptions:
    """The options that a config's `engine` section sets; path: the config's, for messages. Raises ConfigError
    for a key that is none, or a wrong value."""
    known = [setting.name for setting in fields(EngineOptions)]
    for key in section:
        if key not in known:
            raise unknown_key(key, known, f"engine of {path}")
    return EngineOptions(**section)


def whole_number(value: Any, what: str, least: int) -> int:
    """`value` as it is. Raises ConfigError unless it is a whole number of at least `least`; what: its name in
    the message."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} is {value!r}; it must be a whole number, at least {least}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
