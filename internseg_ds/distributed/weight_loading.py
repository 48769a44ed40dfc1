"""Weights from files into a segmentor, whole or partitioned by ZeRO-3.

Whether a file is the right one is decided on names and shapes alone, so a wrong file is refused before any
memory is taken. Values are then read one tensor at a time, and under ZeRO-3 only this rank's shard of a
tensor: a rank needs little more memory than its partition, and more ranks read faster.
"""

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mmseg.models.builder import BACKBONES
from torch import Tensor, nn

from internseg_ds.checkpoints.key_matching import ALLOW, CanResize, KeyMatch, match_keys
from internseg_ds.checkpoints.weights import Weights, recording_invalid, refuse_invalid, renamed
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.process_group import gather_from_ranks
from internseg_ds.distributed.zero_internals import (
    is_partitioned,
    shard_is_only_copy,
    shard_range,
    write_shard,
)
from internseg_ds.errors import CheckpointError, DamagedError
from internseg_ds.lora_names import is_factor, plain_name
from internseg_ds.models.weight_resizing import channels_rule
from internseg_ds.progress import BYTES, progress
from internseg_ds.tensor_part import Part
from internseg_ds.torch_internals import persistent_buffers
from internseg_ds.zero_partition import full_shape

log = logging.getLogger(__name__)

CLASSIFIERS = ("fc.", "head.", "head_dist.", "heads.", "classifier.")
"""What weight files of classifiers hold beside a backbone; it may be left out."""


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """The names in the module's state dict, and the shapes before ZeRO-3's partitioning."""
    persistent = persistent_buffers(module)
    params = {name: full_shape(param) for name, param in module.named_parameters()}
    return params | {name: buffer.shape for name, buffer in module.named_buffers() if name in persistent}


def plain_names(module: nn.Module) -> dict[str, str]:
    """Names in the module's state dict, as they are in a model without adapters -> as they are here. The
    adapters' own parameters have none."""
    return {plain_name(name): name for name in shapes_of(module) if not is_factor(name)}


def _plain_shapes(module: nn.Module) -> dict[str, torch.Size]:
    shapes = shapes_of(module)
    return {plain: shapes[name] for plain, name in plain_names(module).items()}


def match_segmentor(
    model: nn.Module, weights: Weights, may_differ: tuple[str, ...] | None = None
) -> KeyMatch:
    """Matches the weights of a whole segmentor with `model`; a batch norm's batch counter may be missing.
    The adapters of a model keep their values: weights are of a model without (`open_weights` merges them).

    may_differ: prefixes of names that the file may lack or have in addition; None where the caller has no
    such setting, for it wants these very weights: of images with as many channels, too. Raises CheckpointError
    when names or shapes do not match.
    """
    found = _match_whole(model, weights, _plain_shapes(model), may_differ)
    found.sources = _by_own_names(model, found.sources)
    return found


def match_saved(model: nn.Module, weights: Weights) -> KeyMatch:
    """As `match_segmentor`, of a ZeRO checkpoint as it is with the `model` of a run that goes on from it: the
    parameters of adapters too."""
    return _match_whole(model, weights, shapes_of(model), None)


def _match_whole(
    model: nn.Module,
    weights: Weights,
    shapes: dict[str, torch.Size],
    may_differ: tuple[str, ...] | None,
) -> KeyMatch:
    counters = tuple(name for name in shapes if name.endswith("num_batches_tracked"))
    return match_keys(
        weights,
        shapes,
        resizable=_resizable(model, "backbone.", of_other_channels=may_differ is not None),
        ignore=may_differ or (),
        may_miss=counters + (may_differ or ()),
        advice="" if may_differ is None else ALLOW,
    )


def _by_own_names(module: nn.Module, sources: dict[str, str], prefix: str = "") -> dict[str, str]:
    """`sources` of a match with plain names, by the names that the parameters have in the module, behind
    `prefix`."""
    own = plain_names(module)
    return {prefix + own[name]: source for name, source in sources.items()}


def match_backbone(model: nn.Module, weights: Weights, may_differ: tuple[str, ...] = ()) -> KeyMatch:
    """Matches pretrained weights with the backbone of `model`: weights of the backbone alone, in any layout
    that it knows, or of a whole model that has it.

    may_differ: prefixes of names, the backbone's or the file's, that the file may lack or have in addition.
    Raises CheckpointError when names or shapes do not match, and names the backbone that would read the file
    where it is in the layout of another.
    """
    try:
        return _match_backbone(model, weights, may_differ)
    except CheckpointError as error:
        if reader := _other_reader(model.backbone, weights):
            raise CheckpointError(
                f"{error}; its layout is read by another backbone: model.backbone=dict({reader}, ...)"
            ) from error
        raise


def _other_reader(backbone: Any, weights: Weights) -> str | None:
    """How a config names a backbone that reads the layout of a file; None where `backbone` itself does, or
    none."""
    own = type(backbone)
    if _recognised(own, weights):
        return None
    found = (_recognised(kind, weights) for kind in BACKBONES.module_dict.values() if kind is not own)
    return next((reader for reader in found if reader), None)


def _recognised(kind: type, weights: Weights) -> str | None:
    """What a backbone's class says of a file (`Backbone.recognises`)."""
    return getattr(kind, "recognises", lambda *_: None)(weights.shapes, weights.config)


def _match_backbone(model: nn.Module, weights: Weights, may_differ: tuple[str, ...]) -> KeyMatch:
    backbone: Any = model.backbone
    _check_config(backbone, weights)
    prefix = _backbone_prefix(weights)
    if layout := getattr(backbone, "published_sources", lambda _: None)(weights.shapes):
        tower, sources = layout
        taken = [place for places in sources.values() for place in places]
        used = {place.key if isinstance(place, Part) else place for place in taken}
        # beside a vision tower lies a language model
        rest = [name for name in weights.shapes if name not in used and name.startswith(tower)]
        weights = renamed(weights, sources, rest)
    extras = CLASSIFIERS + tuple(getattr(backbone, "pretrained_extras", ()))
    own = tuple(getattr(backbone, "not_pretrained", ()))
    found = match_keys(
        weights,
        _plain_shapes(backbone),
        prefix=prefix,
        resizable=_resizable(model, ""),
        ignore=extras + own + may_differ,
        may_miss=own + may_differ,
    )
    found.sources = _by_own_names(backbone, found.sources, "backbone.")
    return found


def match_part(model: nn.Module, part: str, weights: Weights, may_differ: tuple[str, ...] = ()) -> KeyMatch:
    """Matches pretrained weights with one module inside the backbone, `part` by its name in the segmentor.
    Raises CheckpointError when names or shapes do not match."""
    module = model.get_submodule(part)
    found = match_keys(
        weights,
        _plain_shapes(module),
        prefix=_backbone_prefix(weights),
        ignore=CLASSIFIERS + may_differ,
        may_miss=may_differ,
    )
    found.sources = _by_own_names(module, found.sources, f"{part}.")
    return found


def _backbone_prefix(weights: Weights) -> str:
    """What the names of a backbone begin with in a file."""
    return "backbone." if any(name.startswith("backbone.") for name in weights.shapes) else ""


def _check_config(backbone: Any, weights: Weights) -> None:
    """The backbone must have the arguments that the config.json beside the weights asks for: not all of them
    show in the shapes."""
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
            f"{weights.path / 'config.json'} describes another backbone than the config, which has {ours}; "
            f"write --cfg-options {settings}"
        )


def _resizable(model: nn.Module, prefix: str, *, of_other_channels: bool = True) -> dict[str, CanResize]:
    """of_other_channels: also what is of images with another number of channels."""
    resizable = getattr(model.backbone, "resizable", {})
    return {
        prefix + name: can_resize if of_other_channels else partial(_same_channels, can_resize)
        for name, (can_resize, _) in resizable.items()
    }


def _same_channels(can_resize: CanResize, in_file: torch.Size, in_model: torch.Size) -> bool:
    return not channels_rule(in_file, in_model) and can_resize(in_file, in_model)


def resized(model: nn.Module, name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in the file as the parameter `name` of the segmentor needs it: of `shape`, resized in the
    way that the backbone defines. A tensor without dimensions becomes a vector of one element."""
    if value.dim() == 0:
        return value.view(shape)
    if value.shape == shape:
        return value
    backbone: Any = model.backbone
    _, resize = backbone.resizable[name.removeprefix("backbone.")]
    return resize(value, shape)


def watched(model: nn.Module, found: KeyMatch, invalid: dict[str, str]) -> Weights:
    """The file's weights; reading values that no parameter of a model has (`recording_invalid`) records them in
    `invalid`."""
    names = {found.sources[name] for name, _ in model.named_parameters() if name in found.sources}
    return recording_invalid(found.weights, names, invalid)


def load(model: nn.Module, found: KeyMatch) -> None:
    """Reads what `found` matched into the model. Under ZeRO-3 each rank reads its own shard of each
    parameter. Collective where there is a process group.

    Raises CheckpointError, on every rank, when some rank read values that no weights have (NaN, infinite, or
    integers for numbers); DamagedError when some rank could not read, or read what was not written.
    """
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    invalid: dict[str, str] = {}
    damage: str | None = None
    weights = watched(model, found, invalid)
    sizes = {name: _bytes_read(value) for name, value in (params | buffers).items()}
    total = sum(sizes[name] for name in found.sources)
    with progress("loading weights", total, BYTES) as done:
        for name, source in found.sources.items():
            try:
                with torch.no_grad():
                    if name in buffers:
                        buffers[name].copy_(weights.read(source))
                    else:
                        _load_param(model, name, params[name], weights, source)
            except CheckpointError as error:  # the other ranks, which read elsewhere, go on
                damage = damage or str(error)
            done.advance(sizes[name])
    of_ranks = gather_from_ranks((invalid, damage))
    for _, their_damage in of_ranks:
        if their_damage:
            raise DamagedError(their_damage)
    refuse_invalid(weights, {name: values for theirs, _ in of_ranks for name, values in theirs.items()})
    log.info("%s: %s", weights.path, found.summary())


def _bytes_read(value: Tensor) -> int:
    """What this rank keeps of a parameter or buffer once it is read, in bytes."""
    if isinstance(value, nn.Parameter) and is_partitioned(value):
        first, end = shard_range(value)
        return (end - first) * value.itemsize
    return value.nbytes


def _load_param(model: nn.Module, name: str, param: nn.Parameter, weights: Weights, source: str) -> None:
    """Collective where `param` is partitioned and its shard is not its only copy."""
    if not is_partitioned(param):
        param.copy_(resized(model, name, weights.read(source), param.shape))
    elif shard_is_only_copy(param):
        _load_shard(model, name, param, weights, source)
    else:
        with gathered([param], modifier_rank=0):
            if dist.get_rank() == 0:
                param.copy_(resized(model, name, weights.read(source), full_shape(param)))


def _load_shard(model: nn.Module, name: str, param: nn.Parameter, weights: Weights, source: str) -> None:
    """Reads this rank's shard alone from the file, unless the tensor in the file must be resized first."""
    start, stop = shard_range(param)
    if weights.shapes[source] == full_shape(param):
        values = weights.read_slice(source, start, stop)
    else:
        values = resized(model, name, weights.read(source), full_shape(param)).flatten()[start:stop]
    write_shard(param, values)
