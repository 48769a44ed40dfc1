"""Weights from files into a segmentor, whole or partitioned by ZeRO-3.

Which names fit is decided on shapes alone, so a file that does not fit is refused before any memory is taken. Values are then read one tensor at a time,
and under ZeRO-3 one share of a tensor: a rank's memory holds its partition and little more, and more ranks read faster.
"""

import logging

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor, nn

from internseg_ds.checkpoints.fitting import CanResize, Fit, fit
from internseg_ds.checkpoints.weights import Weights, noting_unfit, refuse_unfit, renamed
from internseg_ds.distributed.construction import gathered
from internseg_ds.distributed.parameter_groups import full_shape
from internseg_ds.distributed.process_group import of_all_ranks
from internseg_ds.errors import CheckpointError, DamagedError

log = logging.getLogger(__name__)

CLASSIFIERS = ("fc.", "head.", "head_dist.", "heads.", "classifier.")
"""What weight files of classifiers hold beside a backbone, which may be passed over."""


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Names and whole shapes of everything in the module's state dict."""
    return {name: full_shape(param) for name, param in module.named_parameters()} | {
        name: buffer.shape for name, buffer in module.named_buffers() if name in _persistent(module)
    }


def _persistent(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name, _ in owner.named_buffers(recurse=False)
        if name not in owner._non_persistent_buffers_set
    }


def fit_segmentor(model: nn.Module, weights: Weights, may_differ: tuple[str, ...] = ()) -> Fit:
    """Weights of a whole segmentor; a batch norm's batch counter may be missing. may_differ: prefixes of names that the file may have too many or too few.

    Raises CheckpointError when they do not fit.
    """
    counters = tuple(name for name in shapes_of(model) if name.endswith("num_batches_tracked"))
    return fit(
        weights,
        shapes_of(model),
        resizable=_resizable(model, "backbone."),
        ignore=may_differ,
        may_miss=counters + may_differ,
    )


def fit_backbone(model: nn.Module, weights: Weights, may_differ: tuple[str, ...] = ()) -> Fit:
    """Pretrained weights of the backbone alone, in any layout that it knows, or of a whole model of which the backbone is taken.

    may_differ: prefixes of the backbone's names (or the file's) that the file may have too many or too few. Raises CheckpointError when they do not fit.
    """
    backbone = model.backbone
    _check_config(backbone, weights)
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights.shapes) else ""
    if layout := getattr(backbone, "published_sources", lambda _: None)(weights.shapes):
        tower, sources = layout
        taken = {name for names in sources.values() for name in names}
        rest = [
            name for name in weights.shapes if name not in taken and name.startswith(tower)
        ]  # beside a vision tower lies a language model
        weights = renamed(weights, sources, rest)
    extras, own = (
        CLASSIFIERS + tuple(getattr(backbone, "pretrained_extras", ())),
        tuple(getattr(backbone, "not_pretrained", ())),
    )
    found = fit(
        weights,
        shapes_of(backbone),
        prefix=prefix,
        resizable=_resizable(model, ""),
        ignore=extras + own + may_differ,
        may_miss=own + may_differ,
    )
    found.sources = {f"backbone.{name}": source for name, source in found.sources.items()}
    return found


def fit_part(model: nn.Module, part: str, weights: Weights, may_differ: tuple[str, ...] = ()) -> Fit:
    """Pretrained weights of one module inside the backbone, by its name in the segmentor. Raises CheckpointError when they do not fit."""
    prefix = "backbone." if any(name.startswith("backbone.") for name in weights.shapes) else ""
    found = fit(
        weights,
        shapes_of(model.get_submodule(part)),
        prefix=prefix,
        ignore=CLASSIFIERS + may_differ,
        may_miss=may_differ,
    )
    found.sources = {f"{part}.{name}": source for name, source in found.sources.items()}
    return found


def _check_config(backbone: nn.Module, weights: Weights) -> None:
    """The arguments that a folder's config.json asks for must be the backbone's: not all of them show in the shapes."""
    if weights.config is None or not hasattr(backbone, "arguments_of"):
        return
    asked = {
        name: value
        for name, value in backbone.arguments_of(weights.config).items()
        if backbone.arguments[name] != value
    }
    if asked:
        ours = ", ".join(f"{name}={backbone.arguments[name]!r}" for name in asked)
        settings = " ".join(f"model.backbone.{name}={value}" for name, value in asked.items())
        raise CheckpointError(
            f"{weights.path / 'config.json'} describes another backbone than the config, which has {ours}; write --cfg-options {settings}"
        )


def _resizable(model: nn.Module, prefix: str) -> dict[str, CanResize]:
    return {
        prefix + name: can_resize
        for name, (can_resize, _) in getattr(model.backbone, "resizable", {}).items()
    }


def resized(model: nn.Module, name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """`value` as the parameter `name` of the segmentor needs it: resized where the backbone says how; of one without dimensions, a vector."""
    if value.dim() == 0:
        return value.view(shape)
    return (
        value
        if value.shape == shape
        else model.backbone.resizable[name.removeprefix("backbone.")][1](value, shape)
    )


def watched(model: nn.Module, found: Fit, unfit: dict[str, str]) -> Weights:
    """The file's weights, whose reads note in `unfit` what no model has (`noting_unfit`)."""
    return noting_unfit(
        found.weights,
        {found.sources[name] for name, _ in model.named_parameters() if name in found.sources},
        unfit,
    )


def load(model: nn.Module, found: Fit) -> None:
    """Reads what `found` matched into the model. Under ZeRO-3 each rank reads its own share of each parameter. Collective where there is a process group.

    Raises CheckpointError, on every rank, when some rank read values that no weights have (NaN, infinite, or integers for
    numbers); DamagedError when some rank could not read, or read what was not written.
    """
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    unfit: dict[str, str] = {}
    damage: CheckpointError | None = None
    weights = watched(model, found, unfit)
    for name, source in track(
        found.sources.items(), "loading weights", disable=dist.is_initialized() and dist.get_rank() != 0
    ):
        try:
            with torch.no_grad():
                if name in buffers:
                    buffers[name].copy_(weights.read(source))
                elif not hasattr(params[name], "ds_id"):
                    params[name].copy_(resized(model, name, weights.read(source), params[name].shape))
                elif simply_partitioned(params[name]):
                    _load_share(model, name, params[name], weights, source)
                else:
                    with gathered([params[name]], modifier_rank=0):
                        if dist.get_rank() == 0:
                            params[name].copy_(
                                resized(model, name, weights.read(source), full_shape(params[name]))
                            )
        except CheckpointError as error:  # the other ranks, which read elsewhere, go on
            damage = damage or error
    told = of_all_ranks((unfit, damage and str(damage)))
    if damaged := next((said for _, said in told if said), None):
        raise DamagedError(damaged)
    refuse_unfit(weights, {name: values for each, _ in told for name, values in each.items()})
    log.info("%s: %s", weights.path, found.summary())


def simply_partitioned(param: nn.Parameter) -> bool:
    """Whether this rank holds its share of a ZeRO-3 parameter in memory and nobody holds another copy of it (as NVMe offloading and hpZ do)."""
    return (
        param.ds_tensor.numel() == param.ds_tensor.ds_numel
        and getattr(param, "ds_secondary_tensor", None) is None
    )


def _load_share(model: nn.Module, name: str, param: nn.Parameter, weights: Weights, source: str) -> None:
    """Rank r of n holds elements [r * share, (r + 1) * share) of the flat parameter, share = ceil(numel / n); the last ones are padded."""
    shape, share = full_shape(param), param.ds_tensor.ds_numel
    start = min(dist.get_rank(param.ds_process_group) * share, shape.numel())
    stop = min(start + share, shape.numel())
    if weights.shapes[source] == shape:
        value = weights.read_slice(source, start, stop)
    else:
        value = resized(model, name, weights.read(source), shape).flatten()[start:stop]
    param.ds_tensor.data[: stop - start].copy_(value)
