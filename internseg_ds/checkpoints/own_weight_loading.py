"""Weight files that a backbone of mmseg or mmcls reads by code of its own: it renames keys, resizes tables of
relative positions, leaves out a classifier.

In: the backbone's config and a file. Out: the values that the backbone takes from the file, as `Weights`
under the names of its parameters.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmcv.runner import BaseModule
from mmseg.models import build_backbone
from torch import Tensor

from internseg_ds.checkpoints.stored_tensors import HeldTensor
from internseg_ds.checkpoints.weights import Weights
from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.torch_internals import has_load_hooks


def read_by_backbone(config: Mapping[str, Any], path: Path) -> Weights | None:
    """What the `init_weights` of a backbone takes from a file; None where that is less than half of its
    parameters, or the backbone has no such method.

    The backbone is built on the CPU twice, from two seeds. A value that is the same in both, and that
    `init_weights` has changed in one, is from the file; the result has no others. Raises ValueError, in one
    line, where the method fails.
    """
    settings = copy.deepcopy(dict(config))
    if checkpoint_of(settings.get("init_cfg")) is None:
        settings["pretrained"] = str(path)
    runs: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = build_backbone(settings)
            if not isinstance(backbone, BaseModule) or not _reads_itself(backbone):
                return None
            runs.append(_before_and_after(backbone))
    (before, after), (other_before, other_after) = runs
    from_file = {
        name: HeldTensor(value)
        for name, value in after.items()
        if torch.equal(value, other_after[name])
        and not (torch.equal(value, before[name]) and torch.equal(other_after[name], other_before[name]))
    }
    sizes = {name: param.numel() for name, param in backbone.named_parameters()}
    if 2 * sum(size for name, size in sizes.items() if name in from_file) < sum(sizes.values()):
        return None
    return Weights(
        path,
        {name: value.shape for name, value in from_file.items()},
        lambda name: from_file[name].read(),
        lambda name, start, stop: from_file[name].read_slice(start, stop),
    )


def _before_and_after(backbone: BaseModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of a backbone before and after its `init_weights`. Raises ValueError where that fails."""
    before = {name: value.clone() for name, value in _state(backbone).items()}
    logging.disable(logging.WARNING)  # mmcv logs every parameter that it sets
    try:
        backbone.init_weights()
    except Exception as error:  # the file, or a weight in it, is not what the method expects
        raise ValueError(
            f"{type(backbone).__name__} cannot read it in its own way either: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return before, _state(backbone)


def _reads_itself(backbone: BaseModule) -> bool:
    """Whether it has code of its own at all: an `init_weights`, or hooks that change a state dict before it
    is loaded."""
    return type(backbone).init_weights is not BaseModule.init_weights or any(
        has_load_hooks(module) for module in backbone.modules()
    )


def _state(backbone: BaseModule) -> dict[str, Tensor]:
    """Name -> floating-point parameter or buffer."""
    return {
        name: value.detach() for name, value in backbone.state_dict().items() if value.is_floating_point()
    }
