"""Device memory that the tensors of one micro-batch take: what a forward pass keeps for the backward pass,
and the most that lives at once.

In: a segmentor on the meta device, configured as it will train (dtypes, precision hooks, checkpointing), and
a size of images. Out: bytes. Nothing is assumed of any architecture: the real forward and backward passes run
on tensors without storage (`FakeTensorMode`), and each storage is counted from the operation that makes it
until the last tensor of it is gone. Weights are left out, and gradients of weights are freed as they are made:
ZeRO has buffers for both (`planning.zero_memory`).
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
from mmseg.models.segmentors import BaseSegmentor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from internseg_ds.models.backbone import image_channels
from internseg_ds.models.heads import stand_in_loss
from internseg_ds.torch_internals import (
    BATCH_NORM,
    TorchDispatchMode,
    convert_tensors,
    fake_tensor_mode,
    run_backward,
    tree_leaves,
)


@dataclass(frozen=True)
class Activations:
    """Bytes of one training micro-batch. The peaks include `kept` and the batch; weights and their gradients
    are in none, except for the gradient being made."""

    batch: int
    """Images and labels."""
    kept: int
    """Of the backbone's forward pass, for its backward pass: inputs of checkpointed blocks, or what blocks
    save, and the feature maps."""
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
    model: BaseSegmentor, height: int, width: int, micro_batch: int, *, autocast: bool = False
) -> Activations:
    """model: a segmentor with `extract_feat` and heads as mmseg has them, in the dtypes that it trains in; it
    is left as it was.

    height, width: of a training image, in pixels. autocast: the model runs under torch.autocast in bf16.
    Losses, which have no values to compute with, are replaced by `models.heads.stand_in_loss`.
    """
    heads_peaks: list[int] = []
    with _without_storage(model, training=True) as (model, live):
        images = torch.empty(micro_batch, image_channels(model), height, width)
        labels = torch.empty(micro_batch, height, width, dtype=torch.int64)
        batch = live.now
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = model.extract_feat(images)
            kept = live.now - batch
            forward_peak = live.peak_since()
            loss = stand_in_loss(model, features, labels)
        _call_at_first_gradient(features, lambda: heads_peaks.append(live.peak_since()))
        del features
        saved = live.now if loss.requires_grad else 0
        # loss.backward() is a function that GpuKernels sees, and would run without it; blocks that run again
        # are to run as before
        run_backward(loss)
        last_peak = live.peak_since()
    # where no feature has a gradient (a frozen backbone), the heads run to the end
    return Activations(
        batch,
        kept,
        saved,
        heads=heads_peaks[0] if heads_peaks else last_peak,
        blocks=max(forward_peak, last_peak) if heads_peaks else forward_peak,
    )


def evaluation_bytes(
    model: BaseSegmentor, height: int, width: int, windows: int, *, autocast: bool = False
) -> int:
    """The most bytes that live while a segmentor in eval mode makes logits of some windows (height, width) at
    once."""
    with (
        _without_storage(model, training=False) as (model, live),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        channels = image_channels(model)
        shape = (height, width, channels)
        meta = {"img_shape": shape, "pad_shape": shape, "ori_shape": shape}
        model.encode_decode(torch.empty(windows, channels, height, width), [meta] * windows)
        return live.peak_since()


def most_bytes(model: BaseSegmentor, height: int, width: int, micro_batch: int) -> int:
    """More bytes than a micro-batch can take, found without loading FakeTensorMode: three times all that the
    operations of a forward pass return in fp32. Three is an assumption, which
    tests/planning/test_activation_memory.py checks against peaks.

    model: on the meta device. Attention counts with its matrices, checkpointing with none of its savings.
    """
    outputs = _Outputs()
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with outputs, torch.no_grad():
            features = model.extract_feat(torch.empty(1, image_channels(model), height, width, device="meta"))
            labels = torch.empty(1, height, width, dtype=torch.int64, device="meta")
            stand_in_loss(model, features, labels)
    finally:
        for module, mode in modes:
            module.training = mode
    return 3 * micro_batch * outputs.total


class _Outputs(TorchDispatchMode):
    """Adds up the bytes of all tensors that operations return, 4 or more per element."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += sum(
            max(4, tensor.itemsize) * tensor.numel()
            for tensor in tree_leaves(out)
            if isinstance(tensor, Tensor)
        )
        return out


def _call_at_first_gradient(features: Sequence[Tensor], function: Callable[[], None]) -> None:
    """Calls `function` once, when the backward pass leaves the heads: autograd runs what was recorded last
    first, so no block begins before."""
    called = False

    def arrived(_: Tensor) -> None:
        nonlocal called
        if not called:
            called = True
            function()

    for feature in features:
        if feature.requires_grad:
            feature.register_hook(arrived)


@contextmanager
def _without_storage(model: BaseSegmentor, *, training: bool) -> Iterator[tuple[BaseSegmentor, "Live"]]:
    """A copy of the model in training or evaluation mode on CPU tensors without storage, and the count of what
    lives.

    CPU, since plain meta tensors know neither autocast nor fused attention. Batch norms use stored moments:
    there are no values to take those of a batch from; what they save and make has the same size.
    """
    model = copy.deepcopy(model)
    with fake_tensor_mode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_tensors(model, lambda tensor: torch.empty_like(tensor, device="cpu"))
        model.train(training)
        for module in model.modules():
            if isinstance(module, BATCH_NORM):
                module.eval()
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
        live = Live([*model.parameters(), *model.buffers()])
        with live, GpuKernels():
            yield model, live


class Live(TorchDispatchMode):
    """Counts bytes of storages from the operation that makes them until they are freed. now: bytes that live,
    except for those of `known` tensors."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        # kept alive, so that no new storage takes the identity of one
        self._known = [tensor.untyped_storage() for tensor in known]

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
    """Makes and saves what torch's `_fused_rms_norm` does, which on CPUs is several operations: the result;
    the input, the weight and 4 bytes per position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, positions: int) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:positions], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RmsNorm.apply(x, weight, x.dim() - len(normalized_shape))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


STAND_INS: dict[Callable, Callable] = {F.rms_norm: _rms_norm, F.dropout: _dropout}
