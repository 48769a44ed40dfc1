"""The batch of a ds_config: filled in from the experiment, or refused where it says another one."""

from dataclasses import dataclass
from typing import Any

from internseg_ds.errors import ConfigError, counted


@dataclass(frozen=True)
class BatchPerStep:
    """What a recipe asks for in one optimizer step: images of all processes (`engine.global_batch`), or
    micro-batches of each (`optimizer_config.cumulative_iters`); at most one of them. Neither: one micro-batch
    unless the ds_config says more."""

    images: int | None = None
    micro_batches: int | None = None


@dataclass(frozen=True)
class Sources:
    """Names for messages: of the ds_config, and of the experiment config."""

    ds: str
    experiment: str


def accumulation_steps(
    raw: dict[str, Any], micro_batch: int, world_size: int, per_step: BatchPerStep, sources: Sources
) -> int:
    """Micro-batches per optimizer step, from the experiment, else from the ds_config, else 1.

    Raises ConfigError where a global batch cannot be made of them, or the two say different numbers.
    """
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


def fill_batch(
    raw: dict[str, Any], micro_batch: int, world_size: int, accumulation: int, sources: Sources
) -> None:
    """Raises ConfigError where the ds_config has other batch sizes."""
    must_equal(raw, "train_micro_batch_size_per_gpu", micro_batch, "data.samples_per_gpu", sources)
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


def must_equal(raw: dict[str, Any], key: str, value: Any, option: str, sources: Sources) -> None:
    """Sets `key` to the experiment's value. Raises ConfigError where the ds_config has another one."""
    given = raw.get(key, "auto")
    if given not in ("auto", value):
        raise ConfigError(
            f"{key}={given!r} contradicts {option}={value!r}.\n"
            f"  from: {sources.ds}: {key}; {sources.experiment}: {option}\n"
            f'  fix:  set {key} to "auto" in {sources.ds}; the experiment config is its one source'
        )
    raw[key] = value
