"""Everything that this project uses of DeepSpeed without a public, documented name: attributes of partitioned
parameters, the layout of the ZeRO optimizers, counters of the engine, names of files.

All of it was read in DeepSpeed 0.19.8; each docstring names the file and what it relies on. No other file of
the project may use such a name, and tests/distributed/test_zero_internals.py runs each function here on a
real engine: when a release changes what one relies on, the test of that name fails.

`engine` is what `deepspeed.initialize` returns. DeepSpeed is imported inside the functions, since importing
it takes some 6 seconds.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.torch_internals import adam_step_count
from internseg_ds.zero_partition import elements_of_rank, full_shape

if TYPE_CHECKING:
    from deepspeed.runtime.checkpoint_engine import CheckpointEngine

# ---- parameters that ZeRO-3 has partitioned


def is_partitioned(param: nn.Parameter) -> bool:
    """Whether ZeRO-3 manages `param`, that is, whether it must be gathered before it is read.

    runtime/zero/partition_parameters.py (`_convert_to_deepspeed_param`): only such a parameter has a `ds_id`.
    """
    return hasattr(param, "ds_id")


def shard_range(param: nn.Parameter) -> tuple[int, int]:
    """Elements [start, stop) of the flattened parameter that this rank's shard holds; empty for a rank behind
    the last element. Only for partitioned parameters.

    runtime/zero/partition_parameters.py (`_partition_param`): rank r of the n ranks of `ds_process_group`
    holds elements [r * size, (r + 1) * size) with size = ceil(numel / n) = `ds_tensor.ds_numel`, padded at
    the end.
    """
    partitioned: Any = param
    rank = dist.get_rank(partitioned.ds_process_group)
    return elements_of_rank(rank, full_shape(param).numel(), partitioned.ds_tensor.ds_numel)


def undivided(param: nn.Parameter, device: torch.device) -> Tensor | None:
    """The values of a parameter that ZeRO-3 manages, in its shape, where this rank's shard is the whole of it and
    lies on `device`: the memory of the shard, and no copy. Else None.

    runtime/zero/partition_parameters.py: with one process `ds_tensor` has all elements, in the dtype of the parameter
    unless it is quantized (`zero_quantized_weights`), and what is gathered is read from it.
    """
    if not is_partitioned(param):
        return None
    partitioned: Any = param
    shard: Tensor = partitioned.ds_tensor
    alone = dist.get_world_size(partitioned.ds_process_group) == 1
    if not alone or shard.device != device or shard.dtype != param.dtype:
        return None
    return shard.detach().view(full_shape(param))


def write_shard(param: nn.Parameter, values: Tensor) -> None:
    """Overwrites this rank's shard of a partitioned parameter, while it is not gathered.

    values: 1-d, the elements of `shard_range`, in any floating-point dtype; rounded to that of the parameter.

    runtime/zero/partition_parameters.py: `ds_tensor` is the shard, from which the next gather reads.
    """
    partitioned: Any = param
    partitioned.ds_tensor.data[: values.numel()].copy_(values)


def shard_is_only_copy(param: nn.Parameter) -> bool:
    """Whether this rank's shard is in memory and no second copy of it exists elsewhere, so that `write_shard`
    changes the parameter. False with NVMe offloading of parameters, and with hpZ.

    runtime/zero/partition_parameters.py: `ds_tensor` is emptied when its values are moved to NVMe, and hpZ
    (`zero_hpz_partition_size`) gathers from `ds_secondary_tensor`.
    """
    partitioned: Any = param
    shard = partitioned.ds_tensor
    return shard.numel() == shard.ds_numel and getattr(partitioned, "ds_secondary_tensor", None) is None


# ---- the optimizer of ZeRO-1, 2 and 3


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a flattened parameter, which lie in this rank's fp32 partition number
    `partition`, from its element `offset` on."""

    partition: int
    offset: int
    start: int
    stop: int

    @property
    def in_partition(self) -> slice:
        """Where these elements lie in the partition."""
        return slice(self.offset, self.offset + self.stop - self.start)


def fp32_partitions(engine: Any) -> list[nn.Parameter]:
    """This rank's flat fp32 master weights: 1-d fp32 tensors, one for each parameter group (ZeRO-1, 2) or
    sub-group (ZeRO-3). They are the tensors that the inner optimizer updates and keys its state by.

    runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py and, for ZeRO-1 with fp32 gradients,
    runtime/bf16_optimizer.py: one list each, of different names.
    """
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    raise TypeError(f"{type(engine.optimizer).__name__} is no optimizer of ZeRO-1, 2 or 3")


def fragment_of(engine: Any, param: nn.Parameter) -> Fragment | None:
    """Where the fp32 partitions of this rank hold their part of `param`; None for a frozen parameter, and for
    one of which this rank holds nothing (ZeRO-1, 2).

    runtime/zero/stage3.py (`set_grad_positions`): `grad_position` maps the id of a parameter to (sub-group,
    offset, size of the shard). utils/mixed_precision_linkage.py, for ZeRO-1 and 2: `_hp_mapping` of a
    parameter is None or has the addresses of its fragment in the parameter (lp) and in the partition (hp).
    """
    if not param.requires_grad:
        return None
    if engine.zero_optimization_stage() == 3:
        optimizer = engine.optimizer
        sub_group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        return Fragment(sub_group, offset, *shard_range(param))
    linked: Any = param
    mapping = linked._hp_mapping
    if mapping is None:
        return None
    held = mapping.lp_fragment_address
    return Fragment(
        mapping.param_group_index, mapping.hp_fragment_address.start, held.start, held.start + held.numel
    )


def copy_master_weights_to_model(engine: Any) -> None:
    """Copies the fp32 master weights into the parameters that the modules compute with, as an optimizer step
    does at its end. Needed after the master weights were changed from outside. Collective.

    runtime/zero/stage_1_and_2.py, runtime/bf16_optimizer.py: `update_lp_params`. runtime/zero/stage3.py
    (`step`): partitions all parameters, copies sub-group by sub-group, gathers the persistent parameters
    again (small ones, which stay gathered between steps).
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def gather_frozen_where_used(engine: Any) -> None:
    """Makes ZeRO-3 gather small frozen parameters with the modules that use them, once in each step, and no
    longer in a call for each of them after it. After `deepspeed.initialize`; nothing under ZeRO-1 and 2.

    runtime/zero/stage3.py: `step` partitions all parameters, and `_post_step` and `checkpoint_event_epilogue`
    gather those of `persistent_parameters` again, which is read nowhere in between. What is not gathered when
    its module begins is gathered by the module's hook, and `ds_persist` keeps it until the step.
    """
    if engine.zero_optimization_stage() == 3:
        optimizer = engine.optimizer
        optimizer.persistent_parameters = [
            param for param in optimizer.persistent_parameters if param.requires_grad
        ]


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to `deepspeed.initialize`. During training its groups hold, and its state
    is keyed by, the tensors of `fp32_partitions`.

    runtime/zero/stage3.py, stage_1_and_2.py, runtime/bf16_optimizer.py: `optimizer` of the ZeRO optimizer.
    """
    return engine.optimizer.optimizer


def step_count_in_state(optimizer: torch.optim.Optimizer, updates: int, device: torch.device) -> int | Tensor:
    """The count of updates as the state of an Adam or AdamW keeps it under "step".

    optimizer: torch's, or DeepSpeed's CPU Adam. device: of the tensor that it updates.

    ops/adam/cpu_adam.py: a Python int.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return updates if isinstance(optimizer, DeepSpeedCPUAdam) else adam_step_count(optimizer, updates, device)


# ---- Muon

NEWTON_SCHULZ = ("gram", "standard")
"""The iterations of DeepSpeed's Muon: `NS_METHODS` of runtime/zero/muon/original_muon.py."""


def orthogonalized(matrix: Tensor, method: str) -> Tensor:
    """The matrix with singular values of about 1, after the 5 steps that Muon takes; same shape and dtype.

    matrix: (rows, columns). method: of `NEWTON_SCHULZ`; both compute the same: "gram" in fp16 and, for matrices that
    are not square, with fewer operations, "standard" in bf16; on CPUs that lack one of these in fp32.

    runtime/zero/muon/original_muon.py: its functions are compiled for each shape; here they run as they are,
    since they are matrix products but for some additions.
    """
    from deepspeed.runtime.zero.muon import original_muon

    iterate = {
        "gram": original_muon.zeropower_via_gram_newtonschulz,
        "standard": original_muon.zeropower_via_newtonschulz5,
    }[method]
    with torch.compiler.set_stance("force_eager"):
        return iterate(matrix, steps=5).to(matrix.dtype)


# ---- the engine


def set_step_counters(engine: Any, *, steps: int, skipped: int) -> None:
    """Sets the counters that the engine's log, schedule and checkpoints go by, as if it had trained until
    there.

    steps: optimizer steps, with those that were skipped. skipped: those of them whose gradient was not
    finite.

    runtime/engine.py: `global_steps`, `skipped_steps`, `global_samples`, `micro_steps`; the last one decides
    which backward pass is the last of a step.
    """
    engine.global_steps = steps
    engine.skipped_steps = skipped
    engine.global_samples = steps * engine.train_batch_size()
    engine.micro_steps = steps * engine.gradient_accumulation_steps()


def skipped_steps(engine: Any) -> int:
    """How many optimizer steps were skipped since the training began, as their gradient was not finite.

    runtime/engine.py (`_take_model_step`): `skipped_steps` counts them.
    """
    return engine.skipped_steps


def checkpoint_engine_of(engine: Any) -> Any:
    """The object that writes the files of `engine.save_checkpoint`.

    runtime/engine.py: `checkpoint_engine`.
    """
    return engine.checkpoint_engine


def replace_checkpoint_engine(engine: Any, make: "Callable[[Any], CheckpointEngine]") -> None:
    """Makes `engine.save_checkpoint` write its files through another object.

    make: gets what the constructor of DeepSpeed's TorchCheckpointEngine takes, and returns the object.

    runtime/engine.py: `checkpoint_engine` is looked up for each file; `_config` is its argument in
    runtime/checkpoint_engine/utils.py.
    """
    engine.checkpoint_engine = make(engine._config)


def catch_recovery_script_errors(engine: Any, report: Callable[[str, OSError], None]) -> None:
    """Makes `engine.save_checkpoint` go on where DeepSpeed's scripts zero_to_fp32.py and zero_to_torch.py
    cannot be copied into the folder of the checkpoints.

    report: called with the folder and the error.

    runtime/engine.py (`_save_zero_checkpoint`): rank 0 calls `self._copy_recovery_script(folder)`, outside of
    the checkpoint engine; raising there would leave the other ranks waiting in the next barrier.
    """
    copy_scripts = engine._copy_recovery_script

    def copy_or_report(folder: str) -> None:
        try:
            copy_scripts(folder)
        except OSError as error:
            report(folder, error)

    engine._copy_recovery_script = copy_or_report


def leaf_class_names(kind: type[nn.Module]) -> set[str]:
    """The names by which `zero_optimization.leaf_module.classes` of a ds_config may call a class of modules.

    utils/z3_leaf_module.py (`_do_set_z3_leaf_modules`): the class's name, or module and qualified name. A
    class made by internseg_ds/models/derived_class.py has the qualified name of the class that it stands for.
    """
    return {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}


# ---- collectives on CPUs

SHARED_BUFFER_BYTES = 66 * 2**20 + 4096
"""What the shared-memory collectives take of /dev/shm for each process, in whole pages: `allreduce_workspace`
of ops/csrc/cpu/comm/shm.cpp."""


def shared_buffer_file(rank: int) -> Path:
    """The file of a rank's buffer for shared-memory collectives, of the process group that the environment
    (MASTER_ADDR, MASTER_PORT) describes.

    ops/csrc/cpu/comm/shm.cpp (`shm_initialize`): every rank creates its own and opens those of the others, by
    this name, and none removes it.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    return Path("/dev/shm", f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}")


# ---- paths of source files, by which a stack is recognised

COLLECTIVE_FILES = "/deepspeed/comm/"
"""Part of the path of every file of `deepspeed.comm`, whose functions call torch's collectives."""
NVTX_FILE = "/deepspeed/utils/nvtx.py"
"""Where `instrument_w_nvtx` wraps functions: `instrument_w_nvtx(handle.wait)()` waits in a frame of this
file."""
RUNTIME_FILES = "/deepspeed/runtime/"
"""Part of the path of the files whose hooks run during a backward pass."""
