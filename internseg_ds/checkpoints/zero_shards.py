"""What DeepSpeed and this engine write into the files of a ZeRO checkpoint: read, and checked against each
other.

In: the files of one save (`zero_files`). Out: a `ZeroShards`, in which the differences between ZeRO-1, 2 and
3 in names and nesting are gone; how parameters lie in the flat partitions is `zero_checkpoint`'s to know.
Written for the files of deepspeed 0.19.8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internseg_ds.checkpoints.checksums import CheckedFile
from internseg_ds.checkpoints.stored_tensors import Stored, StoredBytes, load_stored
from internseg_ds.checkpoints.zero_files import ZeroFiles, file_of_rank
from internseg_ds.errors import CheckpointError, counted
from internseg_ds.moment_formats import CODES, SCALE


@dataclass(frozen=True)
class OptimizerShard:
    """One rank's optim_states file.

    master_weights: flat partitions of the trained parameters, (n,) float32 or bf16, one a group. moments: by
    the optimizer's names (exp_avg and exp_avg_sq of AdamW), what it keeps of each element, (n,) each, cut
    like the master weights, None for groups of which it keeps something else (Muon); whatever they are held
    in, they are read as floating-point numbers; empty before the first step. counts: by name, what it keeps
    once for each group (step). step: updates that the optimizer had done, None where the file does not say.
    paddings: elements that ZeRO-1 and 2 put behind each parameter of each group, None for none.
    """

    file: Path
    stage: int
    world_size: int
    step: int | None
    master_weights: list[Stored]
    moments: dict[str, list[Stored | StoredBytes | None]]
    counts: dict[str, Any]
    paddings: list[list[int]] | None


@dataclass(frozen=True)
class ModelState:
    """One model_states file: that of a rank under ZeRO-3, the only one under ZeRO-1 and 2.

    module: the state dict of the module, in the run's dtype; under ZeRO-3 its parameters are empty. groups:
    name -> shape of the trained parameters of each optimizer group, in the order of the flat partitions.
    frozen_shapes: of the parameters that do not train; frozen_fragments: their values, under ZeRO-3 this
    rank's share. shared: second names of tied weights -> first name, as far as DeepSpeed lists them.
    client_state: what this engine gave DeepSpeed to save.
    """

    file: Path
    module: dict[str, Any]
    groups: list[dict[str, torch.Size]]
    buffer_names: list[str]
    frozen_shapes: dict[str, torch.Size]
    frozen_fragments: dict[str, Stored]
    shared: dict[str, str]
    steps: int | None
    skipped_steps: int
    samples: int
    scheduled_steps: int | None
    client_state: dict[str, Any]


@dataclass(frozen=True)
class ZeroShards:
    """The content of one save. world_size: of the run that wrote it. optimizer: of `ranks`, in their order;
    model: of the same ranks under ZeRO-3, else one. ema: of `ranks`, flat partitions cut like the master
    weights; None where the run kept no average."""

    stage: int
    world_size: int
    ranks: tuple[int, ...]
    optimizer: list[OptimizerShard]
    model: list[ModelState]
    ema: list[list[Stored]] | None


def read_shards(
    path: Path, files: ZeroFiles, checked: Mapping[str, CheckedFile], *, partial: bool
) -> ZeroShards:
    """Opens all files of a save; tensors stay on the disk.

    checked: what each file should hold, by name. partial: files of ranks on other hosts may be missing.
    Raises CheckpointError when a file is damaged or of another kind, and when they are not of one save.
    """
    optimizer = [
        _optimizer_shard(file, load_stored(file, checked.get(file.name)))
        for file in files.optim_states.values()
    ]
    _check_layout(path, optimizer)
    if len(optimizer) < optimizer[0].world_size and not partial:
        first = optimizer[0].file
        raise CheckpointError(
            f"{file_of_rank(first, len(optimizer))} is missing: {first.name} was saved by "
            f"{counted(optimizer[0].world_size, 'process')}; {files.advice}"
        )
    _check_same_step(path, "optimizer step", {shard.file: shard.step for shard in optimizer})
    stage = optimizer[0].stage
    _check_count_of_model_states(path, files, stage)
    model = [
        _model_state(file, load_stored(file, checked.get(file.name))) for file in files.model_states.values()
    ]
    _check_same_step(path, "step", {state.file: state.steps for state in model})
    return ZeroShards(
        stage=stage,
        world_size=optimizer[0].world_size,
        ranks=tuple(files.optim_states),
        optimizer=optimizer,
        model=model,
        ema=_averages(path, files, checked) if files.ema_states else None,
    )


def _optimizer_shard(file: Path, content: Any) -> OptimizerShard:
    """Raises CheckpointError where a file holds no optimizer state of ZeRO."""
    shard = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if (
        not isinstance(shard, dict)
        or "partition_count" not in shard
        or not {"fp32_flat_groups", "single_partition_of_fp32_groups"} & shard.keys()
    ):
        raise CheckpointError(
            f"{file} holds no optimizer state of ZeRO-1, 2 or 3; give a checkpoint that was saved under "
            "one of them"
        )
    # BF16_Optimizer (ZeRO-1 with fp32 gradients) names no stage
    stage = int(shard.get("zero_stage", 1))
    partitions = shard["partition_count"]  # of each group, or of all
    flat = shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    master_weights = [flat] if isinstance(flat, Stored) else list(flat)
    states = _states(shard)
    kept = {name: value for state in states.values() for name, value in state.items()}
    return OptimizerShard(
        file=file,
        stage=stage,
        world_size=int(max(partitions) if isinstance(partitions, (list, tuple)) else partitions),
        step=_last_step(states),
        master_weights=master_weights,
        moments={
            name: [_moment(states.get(group, {}), name) for group in range(len(master_weights))]
            for name, value in kept.items()
            if _is_moment(value) and not name.endswith(SCALE)
        },
        counts={
            name: value.read() if isinstance(value, Stored) else value
            for name, value in kept.items()
            if value is not None and not _is_moment(value)
        },
        paddings=shard.get("param_alignment_paddings"),
    )


def _states(shard: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Group -> the optimizer's state of it, as torch's optimizers have it."""
    base = shard.get("optimizer_state_dict") or shard.get("base_optimizer_state") or {}
    return base.get("state", {}) if isinstance(base, dict) else {}


def _is_moment(value: Any) -> bool:
    """Whether part of an optimizer's state is of each element: a flat tensor, and no count."""
    return isinstance(value, Stored) and len(value.shape) == 1


def _last_step(states: Mapping[int, Mapping[str, Any]]) -> int | None:
    steps = [state["step"] for state in states.values() if "step" in state]
    return max((int(step.read() if isinstance(step, Stored) else step) for step in steps), default=None)


def _moment(of_group: Mapping[str, Any], name: str) -> Stored | StoredBytes | None:
    """of_group: what the optimizer keeps of a group."""
    if name + SCALE in of_group:
        return StoredBytes(of_group[name], of_group[name + SCALE], CODES[name])
    return of_group.get(name)


def _model_state(file: Path, content: Any) -> ModelState:
    """Raises CheckpointError where a file holds no model state of ZeRO."""
    if not isinstance(content, dict) or not {"module", "param_shapes", "buffer_names"} <= content.keys():
        raise CheckpointError(
            f"{file} holds no model state of a ZeRO checkpoint; copy the checkpoint again, with all its files"
        )
    return ModelState(
        file=file,
        module=content["module"],
        groups=[_sizes(group) for group in content["param_shapes"]],
        buffer_names=content["buffer_names"],
        frozen_shapes=_sizes(content.get("frozen_param_shapes") or {}),
        frozen_fragments=content.get("frozen_param_fragments") or {},
        shared=dict(content.get("shared_params") or {}),
        steps=content.get("global_steps"),
        skipped_steps=int(content.get("skipped_steps") or 0),
        samples=int(content.get("global_samples") or 0),
        scheduled_steps=(content.get("lr_scheduler") or {}).get("last_epoch"),
        client_state={key: value for key, value in content.items() if key == "internseg_ds"},
    )


def _sizes(shapes: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _averages(path: Path, files: ZeroFiles, checked: Mapping[str, CheckedFile]) -> list[list[Stored]]:
    if len(files.ema_states) != len(files.optim_states):
        raise CheckpointError(
            f"{path} has {len(files.ema_states)} ema_states files for {len(files.optim_states)} "
            f"processes; {files.advice}"
        )
    return [
        load_stored(file, checked.get(file.name))["ema_flat_groups"] for file in files.ema_states.values()
    ]


def _check_layout(path: Path, shards: list[OptimizerShard]) -> None:
    """Raises CheckpointError unless all were saved under the same stage by as many processes, and there are
    no more than these."""
    first = shards[0]
    for shard in shards:
        same = (shard.stage, shard.world_size) == (first.stage, first.world_size)
        if not same or len(shards) > first.world_size:
            raise CheckpointError(
                f"{path} mixes runs: {shard.file.name} was saved by "
                f"{counted(shard.world_size, 'process')} under "
                f"ZeRO-{shard.stage}, but there are {len(shards)} such files and {first.file.name} was saved "
                f"by {first.world_size} under ZeRO-{first.stage}; copy the checkpoint again, with all its "
                "files"
            )


def _check_count_of_model_states(path: Path, files: ZeroFiles, stage: int) -> None:
    """Raises CheckpointError unless there is one of each rank under ZeRO-3, and one of all ranks else."""
    found, ranks = len(files.model_states), len(files.optim_states)
    if found == (ranks if stage == 3 else 1):
        return
    missing = ""
    if found < ranks:
        missing = f": {file_of_rank(next(iter(files.model_states.values())), found).name} is missing"
    raise CheckpointError(
        f"{path} has {counted(found, 'model_states file')} for {counted(ranks, 'process')} under "
        f"ZeRO-{stage}{missing}; {files.advice}"
    )


def _check_same_step(path: Path, what: str, steps: Mapping[Path, int | None]) -> None:
    """Raises CheckpointError when files that name a step do not name the same one."""
    known = {file: step for file, step in steps.items() if step is not None}
    if len(set(known.values())) > 1:
        raise CheckpointError(
            f"{path} mixes saves: "
            f"{', '.join(f'{file.name} is of {what} {step}' for file, step in known.items())}; "
            "copy the checkpoint again, with all its files"
        )
