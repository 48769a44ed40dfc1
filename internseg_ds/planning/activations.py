"""Device memory that the tensors of one micro-batch take: what a forward pass keeps for the backward pass, and the most that lives at once.

In: a segmentor on the meta device, configured as it will train (dtypes, precision hooks, checkpointing), and a size of images. Out: bytes. Nothing is
assumed of any architecture: the real forward and backward passes run on tensors without storage (`FakeTensorMode`), and each storage is counted from
the operation that makes it until the last tensor of it is gone. Weights are left out, and gradients of weights are given up as they are made: ZeRO has
buffers for both (`planning.memory`).
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internseg_ds.models.heads import stand_in_loss


@dataclass(frozen=True)
class Activations:
    """Bytes of one training micro-batch. The peaks hold `kept` and the batch; weights and their gradients are in none, but for the gradient being made."""

    batch: int
    """Images and labels."""
    kept: int
    """Of the backbone's forward pass, for its backward pass: inputs of checkpointed blocks, or what blocks save, and the feature maps."""
    saved: int
    """Of the whole forward pass, losses too: all that the backward pass will read."""
    heads: int
    """The most while heads and losses run, forward and backward."""
    blocks: int
    """The most while the backbone runs, forward and backward."""

    @property
    def peak(self) -> int:
        return max(self.heads, self.blocks)


def training_activations(
    model: nn.Module, height: int, width: int, micro_batch: int, *, autocast: bool = False
) -> Activations:
    """model: a segmentor with `extract_feat` and heads as mmseg has them, in the dtypes that it trains in; it is left as it was.

    height, width: of a training image, in pixels. autocast: the model runs under torch.autocast in bf16. Losses, whose values there are none to compute
    with, are stood in for (`models.heads.stand_in_loss`).
    """
    with _without_storage(model.train) as (model, lived):
        images = torch.empty(micro_batch, 3, height, width)
        labels = torch.empty(micro_batch, height, width, dtype=torch.int64)
        batch = lived.now
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model.extract_feat(images)
            kept, forward = lived.now - batch, lived.peak_since()
            loss = stand_in_loss(model, features, labels)
        _at_first_gradient(features, lambda: peaks.append(lived.peak_since()))
        del features
        saved = lived.now if loss.requires_grad else 0
        peaks: list[int] = []
        # loss.backward() is a function that GpuKernels sees, and would run without it; blocks that run again are to run as before
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        last = lived.peak_since()
    return Activations(
        batch, kept, saved, heads=max(peaks or [last]), blocks=max(forward, last if peaks else 0)
    )


def evaluation_bytes(
    model: nn.Module, height: int, width: int, windows: int, *, autocast: bool = False
) -> int:
    """The most that lives while a segmentor in eval mode makes logits of some windows (height, width) at once."""
    with (
        _without_storage(model.eval) as (model, lived),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        meta = {
            "img_shape": (height, width, 3),
            "pad_shape": (height, width, 3),
            "ori_shape": (height, width, 3),
        }
        model.encode_decode(torch.empty(windows, 3, height, width), [meta] * windows)
        return lived.peak_since()


def most_bytes(model: nn.Module, height: int, width: int, micro_batch: int) -> int:
    """More than a micro-batch can take, found without loading FakeTensorMode: thrice all that the operations of a forward pass put out in fp32.

    model: on the meta device. Attention counts with its matrices, checkpointing with none of its savings.
    """
    total = 0

    class Sum(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            total += sum(
                max(4, tensor.itemsize) * tensor.numel()
                for tensor in tree_leaves(out)
                if isinstance(tensor, Tensor)
            )
            return out

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with Sum(), torch.no_grad():
            features = model.extract_feat(torch.empty(1, 3, height, width, device="meta"))
            labels = torch.empty(1, height, width, dtype=torch.int64, device="meta")
            stand_in_loss(model, features, labels)
    finally:
        for module, mode in modes:
            module.training = mode
    return 3 * micro_batch * total


def _at_first_gradient(features: Sequence[Tensor], tell: Callable[[], None]) -> None:
    """Calls `tell` once, when the backward pass leaves the heads: autograd runs what was recorded last first, so no block begins before."""
    told: list[bool] = []

    def arrived(_: Tensor) -> None:
        if not told:
            told.append(True)
            tell()

    for feature in features:
        if feature.requires_grad:
            feature.register_hook(arrived)


@contextmanager
def _without_storage(mode: Callable[[], Any]) -> Iterator[tuple[nn.Module, "Live"]]:
    """A copy of the model whose bound method `mode` (train or eval) this is, in that mode, on CPU tensors without storage, and the count of what lives.

    CPU, since plain meta tensors know neither autocast nor fused attention. Batch norms use stored moments: there are no values to take those of a batch
    from; what they save and make has the same size.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # with what its first operation loads, a second

    model = copy.deepcopy(mode.__self__)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model._apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
        getattr(model, mode.__name__)()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
        lived = Live([*model.parameters(), *model.buffers()])
        with lived, GpuKernels():
            yield model, lived


class Live(TorchDispatchMode):
    """Counts bytes of storages from the operation that makes them until they are freed. now: bytes that live, but for those of `known` tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._known = [
            tensor.untyped_storage() for tensor in known
        ]  # kept alive, so that no other takes the place of one

    def peak_since(self) -> int:
        """The most that lived since the last call, in bytes."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # half of all calls; makes nothing
            return out
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes()).atexit = False
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


class GpuKernels(TorchFunctionMode):
    """Runs as one operation what torch has one GPU kernel for and several CPU operations, which save more."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return STAND_INS.get(func, func)(*args, **kwargs)


class _RmsNorm(torch.autograd.Function):
    """Makes and saves what torch's `_fused_rms_norm` does, which CPUs have in pieces only: the result; the input, the weight and 4 bytes per position."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor | None, positions: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:positions], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RmsNorm.apply(x, weight, x.dim() - len(normalized_shape))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


STAND_INS: dict[Callable, Callable] = {F.rms_norm: _rms_norm, F.dropout: _dropout}
