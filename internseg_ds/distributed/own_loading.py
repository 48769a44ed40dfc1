"""Weight files that a backbone of mmseg or mmcls reads in its own way: it renames keys, resizes tables of relative positions, passes over a classifier.

In: the backbone's config and a file. Out: what the backbone makes of it, as `Weights` under the names of its parameters.
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

from internseg_ds.checkpoints.stored import HeldTensor
from internseg_ds.checkpoints.weights import Weights
from internseg_ds.models.backbone import checkpoint_of


def read_by_backbone(config: Mapping[str, Any], path: Path) -> Weights | None:
    """What the `init_weights` of a backbone takes from a file; None where it takes less than half of its parameters, or has no such method.

    The backbone is built on the CPU, twice: what comes out the same from two seeds, and not as the constructor left it, is from the file. The rest is not in
    the result. Raises ValueError, in one line, where the method fails.
    """
    config = copy.deepcopy(dict(config))
    if checkpoint_of(config.get("init_cfg")) is None:
        config |= {"pretrained": str(path)}
    runs = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = build_backbone(config)
            if not isinstance(backbone, BaseModule) or not _reads_itself(backbone):
                return None
            before = {name: value.clone() for name, value in _state(backbone).items()}
            try:
                _quietly(backbone)
            except Exception as error:  # the file, or a weight of it, is not what the method expects
                raise ValueError(
                    f"{type(backbone).__name__} cannot read it in its own way either: {type(error).__name__}: "
                    f"{(str(error).splitlines() or [''])[0]}"
                ) from error
            runs.append((before, _state(backbone)))
    (first_before, first), (second_before, second) = runs
    taken = {
        name: value
        for name, value in first.items()
        if torch.equal(value, second[name])
        and not (torch.equal(value, first_before[name]) and torch.equal(second[name], second_before[name]))
    }
    numbers = {name: param.numel() for name, param in backbone.named_parameters()}
    if 2 * sum(count for name, count in numbers.items() if name in taken) < sum(numbers.values()):
        return None
    held = {name: HeldTensor(value) for name, value in taken.items()}
    return Weights(
        path,
        {name: value.shape for name, value in held.items()},
        lambda name: held[name].read(),
        lambda name, start, stop: held[name].read_slice(start, stop),
    )


def _reads_itself(backbone: BaseModule) -> bool:
    """Whether it has a way of its own at all: in `init_weights`, or while a state dict is loaded."""
    return type(backbone).init_weights is not BaseModule.init_weights or any(
        module._load_state_dict_pre_hooks for module in backbone.modules()
    )


def _state(backbone: BaseModule) -> dict[str, Tensor]:
    return {
        name: value.detach() for name, value in backbone.state_dict().items() if value.is_floating_point()
    }


def _quietly(backbone: BaseModule) -> None:
    """mmcv logs every parameter that it sets."""
    logging.disable(logging.WARNING)
    try:
        backbone.init_weights()
    finally:
        logging.disable(logging.NOTSET)
