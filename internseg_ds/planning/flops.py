"""One training micro-batch of a segmentor, run on the meta device: its floating-point operations, and the
order in which its modules use their weights.

In: a segmentor on the meta device and the size of a training image. Out: a `TrainingPass`, from which FLOPs,
communication and time are derived. The order is observed, not assumed: checkpointed blocks run again during
the backward pass, and that is recorded as it happens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmseg.models.segmentors import BaseSegmentor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from torch.utils.hooks import RemovableHandle

from internseg_ds.models.backbone import image_channels
from internseg_ds.models.heads import head_outputs
from internseg_ds.torch_internals import BATCH_NORM, tree_leaves


class Use(NamedTuple):
    """A module begins or ends to run, and to need its own weights, in the forward or the backward pass."""

    module: str
    begins: bool


@dataclass(frozen=True)
class TrainingPass:
    """FLOPs are of one image; a multiplication and an addition count as two. uses: in order.
    backbone_backward: with what is recomputed in it, backbone_recomputed."""

    uses: tuple[Use, ...]
    backbone_forward: int
    backbone_backward: int
    backbone_recomputed: int
    heads_forward: int
    heads_backward: int

    @property
    def backbone_flops(self) -> int:
        return self.backbone_forward + self.backbone_backward

    @property
    def heads_flops(self) -> int:
        return self.heads_forward + self.heads_backward

    @property
    def model_flops(self) -> int:
        """Forward and backward without what activation checkpointing adds: the numerator of a model FLOPs
        utilization."""
        return self.backbone_flops + self.heads_flops - self.backbone_recomputed


def training_pass(model: BaseSegmentor, height: int, width: int) -> TrainingPass:
    """model: a segmentor on the meta device, with `extract_feat` and heads as mmseg has them; its weights,
    hooks and modes are left as they were.

    height, width: of a training image, in pixels. Losses are left out: they own no weights, and no operation
    of theirs is a matrix product.
    """
    with in_training(model):
        with _checkpointing_off(model):
            plain = _run(model, height, width)
        uses: list[Use] = []
        with _observed(model, uses):
            found = _run(model, height, width)
    return TrainingPass(
        tuple(uses),
        backbone_forward=found.backbone_forward,
        backbone_backward=found.backbone_backward,
        backbone_recomputed=found.backbone_backward - plain.backbone_backward,
        heads_forward=found.heads_forward,
        heads_backward=found.heads_backward,
    )


class _Flops(NamedTuple):
    backbone_forward: int
    heads_forward: int
    heads_backward: int
    backbone_backward: int


def _run(model: BaseSegmentor, height: int, width: int) -> _Flops:
    """Runs one image forward and backward.

    The graph is cut at the features so that the two backward passes can be told apart. It changes no order:
    autograd runs what was recorded last first, so the heads come before the backbone in any case.
    """
    with _flop_counter() as backbone_forward:
        features: list[Tensor] = model.extract_feat(
            torch.empty(1, image_channels(model), height, width, device="meta")
        )
    entries = [feature.detach().requires_grad_() for feature in features]
    with _flop_counter() as heads_forward:
        leaves = [leaf for _, output in head_outputs(model, entries) for leaf in tree_leaves(output)]
        total = sum((leaf.sum() for leaf in leaves), torch.zeros((), device="meta"))
    with _flop_counter() as heads_backward:
        total.backward()
    reached = [
        (feature, entry.grad)
        for feature, entry in zip(features, entries)
        if feature.requires_grad and entry.grad is not None
    ]
    with _flop_counter() as backbone_backward:
        if reached:
            torch.autograd.backward([feature for feature, _ in reached], [grad for _, grad in reached])
    for param in model.parameters():
        param.grad = None
    return _Flops(
        backbone_forward.get_total_flops(),
        heads_forward.get_total_flops(),
        heads_backward.get_total_flops(),
        backbone_backward.get_total_flops(),
    )


def _flop_counter() -> FlopCounterMode:
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )


def _convolution_backward_flops(
    grad: list[int],
    x: list[int],
    weight: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: list[bool],
    **_: Any,
) -> int:
    """In place of torch's own formula; the arguments are those of `aten::convolution_backward`, tensors as
    shapes. The gradients of input and weight, as far as they are wanted, cost a forward pass each.
    torch 2.13 counts that of the weight as if there were no groups."""
    return conv_flop_count(x, weight, grad, transposed) * sum(wanted[:2])


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, except that batch norms use stored moments: those of a batch would have to be computed,
    and there are no values."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, BATCH_NORM):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """`with_cp` is what mmseg's backbones call activation checkpointing."""
    asked: list[Any] = [module for module in model.modules() if getattr(module, "with_cp", False) is True]
    try:
        for module in asked:
            module.with_cp = False
        yield
    finally:
        for module in asked:
            module.with_cp = True


class _CallInBackward(torch.autograd.Function):
    """The identity, whose backward pass calls a function first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return tensor.clone()  # a view could not be changed in place, as an activation does

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.function()
        return grad, None


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value`, a tensor or a nest of lists and tuples, with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(item, change) for item in value)
    return value


@contextmanager
def _observed(model: nn.Module, uses: list[Use]) -> Iterator[None]:
    """Appends to `uses` where DeepSpeed's hooks of ZeRO-3 fetch and release (runtime/zero/parameter_offload.py):
    around each forward, and from the first gradient of an output to the last of an input."""
    # those without weights too: DeepSpeed gathers ahead at each
    observers = [_Observer(name, uses) for name, _ in model.named_modules()]
    handles: list[RemovableHandle] = []
    for observer, module in zip(observers, model.modules()):
        handles.append(module.register_forward_pre_hook(observer.before_forward))
        handles.append(module.register_forward_hook(observer.after_forward))
    uses.append(Use("", True))  # the segmentor itself, whose own forward would compute losses
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Observer:
    """Notes the uses of one module."""

    def __init__(self, name: str, uses: list[Use]) -> None:
        self._name = name
        self._uses = uses
        self._inputs_without_gradient = 0
        """Of the last forward: the backward pass of the module is over when there is none."""

    def before_forward(self, _: nn.Module, inputs: tuple) -> Any:
        self._begin()
        self._inputs_without_gradient = 0
        return _map_tensors(inputs, self._awaited)

    def after_forward(self, _: nn.Module, __: tuple, output: Any) -> Any:
        self._end()
        return _map_tensors(
            output,
            lambda tensor: _CallInBackward.apply(tensor, self._begin) if tensor.requires_grad else tensor,
        )

    def _awaited(self, tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        self._inputs_without_gradient += 1
        return _CallInBackward.apply(tensor, self._gradient_arrived)

    def _gradient_arrived(self) -> None:
        self._inputs_without_gradient -= 1
        if not self._inputs_without_gradient:
            self._end()

    def _begin(self) -> None:
        self._uses.append(Use(self._name, True))

    def _end(self) -> None:
        self._uses.append(Use(self._name, False))
