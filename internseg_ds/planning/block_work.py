"""What of the work of a backbone's repeated blocks `engine.compile` and `engine.matmul_dtype="float8"` change,
observed in one training micro-batch on the meta device.

In: a segmentor on the meta device and the size of a training image. Out: a `BlockWork`, from which `step_time`
derives what these options save and cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmseg.models.segmentors import BaseSegmentor
from torch import Tensor, nn

from internseg_ds.models.backbone import image_channels
from internseg_ds.models.block_execution.float8_linear import float8_layers
from internseg_ds.models.repeated_blocks import repeated_blocks
from internseg_ds.planning.flops import in_training
from internseg_ds.torch_internals import tree_leaves


@dataclass
class BlockPass:
    """Of one image, in one direction.

    block_elements: elements of the blocks' inputs, once for each run of a block. float8_flops: of the products
    that become float8. converted: elements of activations and gradients that are converted for them;
    converted_weights: of weights, as many for a micro-batch as for an image.
    """

    block_elements: int = 0
    float8_flops: int = 0
    converted: int = 0
    converted_weights: int = 0


@dataclass(frozen=True)
class BlockWork:
    """recomputed: in the backward pass, beside `backward`. Products that a block keeps are not made again, but
    their operands are converted again."""

    forward: BlockPass
    backward: BlockPass
    recomputed: BlockPass


def block_work(model: BaseSegmentor, height: int, width: int) -> BlockWork:
    """model: a segmentor on the meta device, with the activation checkpointing that it will train with; it is
    left as it was. height, width: of a training image, in pixels."""
    observer = _Observer(getattr(model.get_submodule("backbone"), "recomputation", None) == "all_but_matmuls")
    blocks = repeated_blocks(model.get_submodule("backbone"))
    handles = [block.register_forward_hook(observer.block_ran) for block in blocks]
    for block in blocks:
        # a block that is recomputed is not called itself: what is inside it is
        inside = list(block.modules())[1:]
        handles += [part.register_forward_hook(partial(observer.part_ran, block)) for part in inside]
        handles += [layer.register_forward_hook(observer.layer_ran) for layer in float8_layers(block)]
    try:
        with in_training(model):
            image = torch.empty(1, image_channels(model), height, width, device="meta")
            features: Sequence[Tensor] = model.extract_feat(image)
            observer.recomputes = True
            reached = [feature for feature in features if feature.requires_grad]
            if reached:
                torch.autograd.backward(reached, [torch.empty_like(feature) for feature in reached])
    finally:
        for handle in handles:
            handle.remove()
        for param in model.parameters():
            param.grad = None
    return BlockWork(observer.forward, observer.backward, observer.recomputed)


class _Observer:
    """Adds up what runs. recomputes: whether the forward pass is over."""

    def __init__(self, keeps_products: bool) -> None:
        self.keeps_products = keeps_products
        self.recomputes = False
        self.forward, self.backward, self.recomputed = BlockPass(), BlockPass(), BlockPass()
        self._elements: dict[nn.Module, int] = {}
        """Of the input of each block that was not recomputed yet."""

    def block_ran(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        elements = inputs[0].numel()
        self._elements[block] = elements
        self.forward.block_elements += elements
        if any(tensor.requires_grad for tensor in tree_leaves(output) if isinstance(tensor, Tensor)):
            self.backward.block_elements += elements

    def part_ran(self, block: nn.Module, *_: Any) -> None:
        if self.recomputes:
            self.recomputed.block_elements += self._elements.pop(block, 0)

    def layer_ran(self, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        x, weight = inputs[0], layer.weight
        assert isinstance(weight, Tensor)
        flops = 2 * y.numel() * x.shape[-1]
        run = self.recomputed if self.recomputes else self.forward
        run.converted += x.numel()
        run.converted_weights += weight.numel()
        run.float8_flops += 0 if self.recomputes and self.keeps_products else flops
        # the gradient of the input; that of the weight stays a bf16 product
        if not self.recomputes and x.requires_grad:
            self.backward.converted += y.numel()
            self.backward.converted_weights += weight.numel()
            self.backward.float8_flops += flops
