"""One training micro-batch of a segmentor, run on the meta device: its floating-point operations, and the order in which its modules use their weights.

In: a segmentor on the meta device and the size of a training image. Out: a `TrainingPass`, from which FLOPs, communication and time are derived. The
order is observed, not assumed: checkpointed blocks run again during the backward pass, and that is recorded as it happens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from internseg_ds.models.heads import head_outputs


class Use(NamedTuple):
    """A module begins or ends to run, and to need the weights that are its own, in the forward or the backward pass."""

    module: str
    begins: bool


@dataclass(frozen=True)
class TrainingPass:
    """FLOPs are of one image; a multiplication and an addition count as two. `backward` of the backbone holds what is recomputed."""

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
        """Forward and backward without what activation checkpointing adds: the numerator of a model FLOPs utilization."""
        return self.backbone_flops + self.heads_flops - self.backbone_recomputed


def training_pass(model: nn.Module, height: int, width: int) -> TrainingPass:
    """model: a segmentor on the meta device, with `extract_feat` and heads as mmseg has them; its weights, hooks and modes are left as they were.

    height, width: of a training image, in pixels. Losses are left out: they own no weights, and no operation of theirs is a matrix product.
    """
    with _in_training(model):
        with _checkpointing_off(model):
            *_, plain = _run(model, height, width)
        uses: list[Use] = []
        with _observed(model, uses):
            backbone_forward, heads_forward, heads_backward, backbone_backward = _run(model, height, width)
    return TrainingPass(
        tuple(uses),
        backbone_forward,
        backbone_backward,
        backbone_backward - plain,
        heads_forward,
        heads_backward,
    )


def _run(model: nn.Module, height: int, width: int) -> tuple[int, int, int, int]:
    """FLOPs of (backbone forward, heads forward, heads backward, backbone backward).

    The graph is cut at the features so that the two backward passes can be told apart. It changes no order: autograd runs what was recorded last first, so
    the heads come before the backbone in any case.
    """
    counts = []

    @contextmanager
    def counted() -> Iterator[None]:
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
        ) as counter:
            yield
        counts.append(counter.get_total_flops())

    with counted():
        features = model.extract_feat(torch.empty(1, 3, height, width, device="meta"))
    entries = [feature.detach().requires_grad_() for feature in features]
    with counted():
        total = sum(leaf.sum() for _, output in head_outputs(model, entries) for leaf in tree_leaves(output))
    with counted():
        total.backward()
    with counted():
        reached = [
            (feature, entry.grad)
            for feature, entry in zip(features, entries)
            if feature.requires_grad and entry.grad is not None
        ]
        if reached:
            torch.autograd.backward(*map(list, zip(*reached)))
    for param in model.parameters():
        param.grad = None
    return tuple(counts)


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of input and weight, as far as they are wanted, cost a forward pass each.
    torch 2.13 counts that of the weight as if there were no groups."""
    return conv_flop_count(x, weight, grad, transposed) * sum(wanted[:2])


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, except that batch norms use stored moments: theirs of a batch would have to be looked at, and there are no values to look at."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """`with_cp` is what mmseg's backbones call activation checkpointing."""
    asked = [module for module in model.modules() if getattr(module, "with_cp", False) is True]
    try:
        for module in asked:
            module.with_cp = False
        yield
    finally:
        for module in asked:
            module.with_cp = True


class _Tell(torch.autograd.Function):
    """The identity, whose backward pass calls a function first."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, told: Callable[[], None]) -> Tensor:
        ctx.told = told
        return tensor.clone()  # a view could not be changed in place, as an activation does

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.told()
        return grad, None


def _tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_tensors(item, change) for item in value)
    return value


@contextmanager
def _observed(model: nn.Module, uses: list[Use]) -> Iterator[None]:
    """Appends to `uses` where DeepSpeed's hooks of ZeRO-3 fetch and release: around each forward,
    from the first gradient of an output to the last of an input."""
    handles, waiting = [], Counter()

    def watch(name: str, module: nn.Module) -> None:
        def begin() -> None:
            uses.append(Use(name, True))

        def end() -> None:
            waiting[name] -= 1
            if not waiting[name]:
                uses.append(Use(name, False))

        def entering(_: nn.Module, args: tuple) -> tuple:
            begin()
            waiting[name] = 0

            def wrap(tensor: Tensor) -> Tensor:
                if not (tensor.requires_grad and torch.is_grad_enabled()):
                    return tensor
                waiting[name] += 1
                return _Tell.apply(tensor, end)

            return _tensors(args, wrap)

        def leaving(_: nn.Module, __: tuple, output: Any) -> Any:
            uses.append(Use(name, False))
            return _tensors(
                output, lambda tensor: _Tell.apply(tensor, begin) if tensor.requires_grad else tensor
            )

        handles.extend((module.register_forward_pre_hook(entering), module.register_forward_hook(leaving)))

    for name, module in model.named_modules():
        watch(name, module)  # those without weights too: DeepSpeed gathers ahead at each
    uses.append(Use("", True))  # the segmentor itself, whose own forward would compute losses
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
