"""Where the host would wait for a GPU, found without one: operations whose result the host reads, or whose
shape depends on values, and copies that block.

`Waits` sees operations on tensors that lie on a GPU, or pretend to (fake tensors); `HostReads` sees what a
real training on the CPU reads of its tensors.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")
SHAPED_BY_VALUES = (
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
)
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
SOME = 7
"""Elements that stand in for a number which depends on values."""


def caller() -> str:
    """file:function that is at work, without torch's own files and this one."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if not any(part in frame.filename for part in ("/torch/", "/contextlib.py", __file__))
    ]
    return f"{frames[-1].filename.rsplit('/', 1)[1]}:{frames[-1].name}"


class Waits(TorchDispatchMode):
    """Counts by (kind, file:function) in `found`; kinds: "value", "shape", "to host", "to device" (from
    memory that the host may change again).

    Goes inside a FakeTensorMode. What is copied to the host becomes a real tensor of random values, which
    Python code can read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.collectives: list[tuple[str, str]] = []
        """(operation, kind of device) of every tensor that was handed to a collective."""

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        if name.startswith("c10d::"):
            self.collectives += [(name, tensor.device.type) for tensor in tensors]
        if on_gpu and name in READ:
            self._note("value")
            return 1.0 if tensors[0].is_floating_point() else 1
        if on_gpu and name in SHAPED_BY_VALUES:
            self._note("shape")
            return (
                args[0].new_empty((SOME, args[0].dim()), dtype=torch.int64)
                if name == "aten::nonzero"
                else args[0].new_empty(SOME)
            )
        if on_gpu and name in INDEXED:
            masks = [
                index
                for index in tree_leaves(args[1])
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            ]
            if masks:
                self._note("shape")
                if name == "aten::index":
                    return args[0].new_empty(SOME, *args[0].shape[masks[0].dim() :])
        if name in ("aten::_to_copy", "aten::copy_"):
            source, target = (
                (args[0], kwargs.get("device") or args[0].device)
                if name == "aten::_to_copy"
                else (args[1], args[0].device)
            )
            waits = not (kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2]))
            if source.is_cuda and torch.device(target).type == "cpu":
                if waits:
                    self._note("to host")
                with unset_fake_temporarily():
                    return torch.rand(source.shape).to(kwargs.get("dtype") or source.dtype)
            if not source.is_cuda and torch.device(target).type == "cuda" and waits:
                self._note("to device")
        if (
            tensors
            and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
            and torch.device(kwargs.get("device") or "cpu").type == "cpu"
        ):
            with unset_fake_temporarily():  # what was copied to the host
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(self, kind: str) -> None:
        self.found[kind, caller()] += 1


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Tensors made inside have no storage and may lie on "cuda"; operations that mix devices are errors."""
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        yield waits


class HostReads(TorchFunctionMode):
    """Counts, by file:function, the calls by which the host reads a tensor of a real training."""

    NAMES = (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "equal",
        "masked_select",
        "unique",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self.NAMES:
            self.found[caller()] += 1
        return func(*args, **(kwargs or {}))
