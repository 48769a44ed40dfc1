"""Weights from files into a segmentor, whole or partitioned by ZeRO-3.

Which names fit is decided on shapes alone, so a file that does not fit is refused before any memory is taken; values are then read one tensor at a time.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.checkpoints.fitting import CanResize, Fit, fit
from internseg_ds.checkpoints.weights import Weights
from internseg_ds.distributed.construction import gathered
from internseg_ds.distributed.parameter_groups import full_shape

log = logging.getLogger(__name__)


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Names and whole shapes of everything in the module's state dict."""
    return {name: full_shape(param) for name, param in module.named_parameters()} | {
        name: buffer.shape for name, buffer in module.named_buffers() if name in _persistent(module)}


def _persistent(module: nn.Module) -> set[str]:
    return {f"{prefix}.{name}" if prefix else name for prefix, owner in module.named_modules()
            for name, _ in owner.named_buffers(recurse=False) if name not in owner._non_persistent_buffers_set}


def fit_segmentor(model: nn.Module, weights: Weights) -> Fit:
    """Weights of a whole segmentor; a batch norm's batch counter may be missing. Raises CheckpointError when they do not fit."""
    counters = tuple(name for name in shapes_of(model) if name.endswith("num_batches_tracked"))
    return fit(weights, shapes_of(model), resizable=_resizable(model, "backbone."), may_miss=counters)


def fit_backbone(model: nn.Module, weights: Weights) -> Fit:
    """Pretrained weights of the backbone alone, or of a whole segmentor of which the backbone is taken. Raises CheckpointError when they do not fit."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights.shapes) else ""
    backbone = model.backbone
    extras, own = (tuple(getattr(backbone, name, ())) for name in ("pretrained_extras", "not_pretrained"))
    found = fit(weights, shapes_of(backbone), prefix=prefix, resizable=_resizable(model, ""), ignore=extras + own, may_miss=own)
    found.sources = {f"backbone.{name}": source for name, source in found.sources.items()}
    return found


def _resizable(model: nn.Module, prefix: str) -> dict[str, CanResize]:
    return {prefix + name: can_resize for name, (can_resize, _) in getattr(model.backbone, "resizable", {}).items()}


def reader(model: nn.Module, weights: Weights, found: Fit) -> Callable[[str, torch.Size], Tensor]:
    """read(name in the model, its shape) -> the file's value, resized where the backbone says how."""
    resize = {f"backbone.{name}": function for name, (_, function) in getattr(model.backbone, "resizable", {}).items()}

    def read(name: str, shape: torch.Size) -> Tensor:
        value = weights.read(found.sources[name])
        return resize[name](value, shape) if value.shape != shape else value

    return read


def load(model: nn.Module, weights: Weights, found: Fit) -> None:
    """Reads what `found` matched into the model; collective under ZeRO-3. Rank 0's values count, each gathered, set and partitioned in turn."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    value = reader(model, weights, found)
    reads = not dist.is_initialized() or dist.get_rank() == 0
    for name in found.sources:
        if name in params:
            param = params[name]
            partitioned = hasattr(param, "ds_id")
            with gathered([param], modifier_rank=0), torch.no_grad():
                if reads or not partitioned:
                    param.copy_(value(name, full_shape(param)))
        else:
            buffers[name].copy_(value(name, buffers[name].shape))
    log.info("%s: %s", weights.path, found.summary())
