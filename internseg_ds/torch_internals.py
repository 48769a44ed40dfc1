"""Everything that this project uses of torch without a public name. No other file may use such a name;
tests/test_torch_internals.py tells which one a new version of torch has changed.

Read in torch 2.10 to 2.13.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "BACKWARD_FILE",
    "BACKWARD_FUNCTION",
    "BATCH_NORM",
    "NORM_WITH_MOMENTS",
    "TorchDispatchMode",
    "adam_step_count",
    "build_was_interrupted",
    "compilation_error",
    "convert_tensors",
    "copy_tensors",
    "cpu_multiplies_bf16",
    "extension_folder",
    "fake_tensor_mode",
    "has_load_hooks",
    "in_backward_pass",
    "operator_schema",
    "persistent_buffers",
    "position_in_file",
    "reset_parameters_of",
    "run_backward",
    "scaled_product",
    "set_schedule_position",
    "storage_id",
    "tree_leaves",
    "tree_map",
]

BATCH_NORM = nn.modules.batchnorm._BatchNorm
"""The base class of nn.BatchNorm1d, 2d, 3d and nn.SyncBatchNorm."""
NORM_WITH_MOMENTS = nn.modules.batchnorm._NormBase
"""The base class of all norms that may keep moments: batch norms and instance norms."""

BACKWARD_FILE = "torch/autograd/graph.py"
"""End of the path of the file, and name of the function, in which the thread that called backward() stands
while autograd's own threads run the backward pass."""
BACKWARD_FUNCTION = "_engine_run_backward"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products (AVX-512)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- tensors


def scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a a_scale) times (b b_scale), summed in fp32. a: (m, k) e4m3, contiguous; b: (k, n) e4m3, the transpose of
    a contiguous one; scales: (m, 1) and (1, n) float32. Returns (m, n) in `dtype`."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)


def storage_id(tensor: Tensor) -> int:
    """A number that tensors share if, and only if, they share a storage. Also of tensors without values."""
    return tensor.untyped_storage()._cdata


def position_in_file(tensor: Tensor) -> int | None:
    """The byte of a checkpoint file at which the storage of `tensor` begins; None where it was not read by
    torch.load(map_location="meta")."""
    return tensor.untyped_storage()._checkpoint_offset


def fake_tensor_mode(**options: Any) -> AbstractContextManager[Any]:
    """Inside, tensors have shapes, dtypes and devices, and no values. Loads a good part of torch: a second,
    and 130 MB."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(**options)


def is_fake(value: Any) -> bool:
    """Whether a tensor was made inside `fake_tensor_mode`, and so has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def copy_tensors(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies each of `sources` into its one of `targets`, on a GPU in few kernels. Neither may be empty."""
    torch._foreach_copy_(list(targets), list(sources))


def operator_schema(operator: Callable) -> Any:
    """Name and arguments of an operator that a TorchDispatchMode sees."""
    return operator._schema  # type: ignore[attr-defined]  # of torch._ops.OpOverload


def in_backward_pass() -> bool:
    """Whether autograd computes gradients in this thread now: what runs forward then is recomputed."""
    return torch._C._current_graph_task_id() != -1


# ---- modules


def convert_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replaces the values of all parameters and buffers of `module`, as `module.to` does."""
    module._apply(convert)


def persistent_buffers(module: nn.Module) -> set[str]:
    """Names of the buffers that the module's state dict holds."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name, _ in owner.named_buffers(recurse=False)
        if name not in owner._non_persistent_buffers_set
    }


def has_load_hooks(module: nn.Module) -> bool:
    """Whether `module` itself changes state dicts before it loads them."""
    return bool(module._load_state_dict_pre_hooks)


def reset_parameters_of(module: nn.Module) -> Callable[[], None] | None:
    """What draws the initial values of the parameters that `module` itself owns: `reset_parameters`, which
    torch's MultiheadAttention calls `_reset_parameters`."""
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


# ---- training


def run_backward(loss: Tensor) -> None:
    """loss.backward(), unseen by a TorchFunctionMode: `Tensor.backward` is a function that it would see."""
    engine = torch.autograd.Variable._execution_engine
    gradient = torch.ones_like(loss)
    engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def adam_step_count(optimizer: torch.optim.Optimizer, updates: int, device: torch.device) -> Tensor:
    """The count of updates as the state of torch's Adam and AdamW keeps it under "step": fp32, without
    dimensions.

    device: of the tensor that the optimizer updates. The count is there if the kernel reads it (fused,
    capturable), else on the CPU, where reading it does not wait for the GPU.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(updates), device=device if on_device else "cpu")


def set_schedule_position(scheduler: Any, updates: int, rates: Sequence[float]) -> None:
    """Puts a torch.optim.lr_scheduler.LRScheduler, and the groups of its optimizer, where `updates` updates
    have led. rates: the learning rate of each group from now on."""
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.last_epoch = updates
    scheduler._step_count = updates + 1
    scheduler._last_lr = list(rates)


def compilation_error() -> type[Exception]:
    """What torch.compile raises where it cannot trace or compile a function."""
    from torch._dynamo.exc import TorchDynamoException  # here: it takes a second

    return TorchDynamoException


# ---- extensions in C++


def extension_folder(name: str) -> Path:
    """The folder in which torch.utils.cpp_extension builds the extension of this name; made if need be."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, verbose=False))


def build_was_interrupted(folder: Path) -> bool:
    """Whether the file is there that torch makes while it builds in this folder. Where nobody builds, a
    process was killed while it did."""
    return (folder / "lock").exists()
