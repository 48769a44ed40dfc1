"""Whole weights for evaluation: a plain copy of a model that ZeRO-3 has partitioned.

Every forward of a partitioned model gathers its weights collectively, so ranks that run different numbers of forwards (sliding windows differ per
image) would wait for each other for ever. A plain copy gathers once, while ranks are in step, and then owes nothing to anybody.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmcv import ConfigDict
from torch import Tensor, nn

from internseg_ds.distributed.construction import build_on_meta, fill, gathered
from internseg_ds.distributed.precision import apply_precision


@contextmanager
def whole_segmentor(module: nn.Module, model: ConfigDict, compute: torch.dtype, device: torch.device, *, autocast: bool = False) -> Iterator[nn.Module]:
    """A segmentor in eval mode whose forwards are this rank's own affair. Entering is collective under ZeRO-3; inside, nothing is.

    module: the trained segmentor. Under ZeRO-1/2 it is whole already and is lent; under ZeRO-3 a copy of `model` (the config's section) is filled,
    one parameter at a time, in the stored dtype (12 GB for 6 B in bf16), and freed at the end. Buffers are this rank's.
    """
    if not any(hasattr(param, "ds_id") for param in module.parameters()):
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                yield module
        finally:
            module.train(training)
        return
    copy, trained, buffers = build_on_meta(model), dict(module.named_parameters()), dict(module.named_buffers())

    def whole(name: str, _: torch.Size) -> Tensor:
        with gathered([trained[name]]):
            return trained[name].data.to(device, copy=True)

    fill(copy, whole, lambda name, _: buffers[name].detach().clone())
    apply_precision(copy, compute, autocast=autocast)
    copy.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        yield copy
