"""The weights that a fresh run starts from, and those of a finished checkpoint: fitted to a model by names
and shapes, before a value is read."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from internseg_ds.checkpoints.key_matching import KeyMatch
from internseg_ds.checkpoints.own_weight_loading import read_by_backbone
from internseg_ds.checkpoints.weights import Weights, open_weights
from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.weight_loading import (
    match_backbone,
    match_part,
    match_segmentor,
    plain_names,
)
from internseg_ds.errors import CheckpointError, ConfigError, counted, shortened
from internseg_ds.models.backbone import checkpoint_of, pretrained_elsewhere, pretrained_file
from internseg_ds.models.heads import heads
from internseg_ds.preflight.model_checks import check_same_classes

log = logging.getLogger(__name__)

Fit: TypeAlias = Callable[[Any, Weights, tuple[str, ...]], KeyMatch]
"""Of a model, its weights, and the names of `engine.weights_may_differ`."""


def starting_weights(
    experiment: Experiment, model: Any, load_from: str | os.PathLike | None
) -> KeyMatch | None:
    """What a fresh run loads, in order of precedence: `load_from` of the command line, the config's, the
    backbone's `pretrained`. None: random weights.

    model: on the meta device is enough. Raises CheckpointError for a file that is not there or does not fit,
    and for an address on the web: nothing is downloaded here. Raises ConfigError when another part than the
    backbone asks for weights of its own, or several do.
    """
    setting, source, fit = _chosen(experiment, model, load_from)
    if source is None:
        return None
    path = _existing_file(setting, source)
    weights = open_weights(path, check=experiment.engine.checksums)
    try:
        return fit(model, weights, experiment.engine.weights_may_differ)
    except CheckpointError as error:
        try:
            own = read_by_backbone(experiment.model.backbone, path) if fit is match_backbone else None
        except ValueError as reason:
            raise CheckpointError(f"{error} ({reason})") from None
        if own is None:
            raise
    return _fit_of_backbones_own_reading(model, own, path)


def _chosen(experiment: Experiment, model: Any, load_from: str | os.PathLike | None) -> tuple[str, Any, Fit]:
    """The setting that names the weights, its value (None for random weights), and how they are fitted to the
    model. Raises ConfigError as `starting_weights` does."""
    fit: Fit
    if load_from is not None:
        setting, source, fit = "--load-from", load_from, match_segmentor
    elif experiment.load_from is not None:
        setting, source, fit = "load_from", experiment.load_from, match_segmentor
    else:
        setting, source, fit = (
            _pretrained_setting(experiment, model),
            pretrained_file(model.backbone),
            match_backbone,
        )
        _check_one_source(model.backbone)
        elsewhere = pretrained_elsewhere(model)
        # a backbone around another one
        if source is None and len(elsewhere) == 1 and elsewhere[0].startswith("backbone."):
            setting, source = (
                f"model.{elsewhere[0]}.init_cfg.checkpoint",
                checkpoint_of(model.get_submodule(elsewhere[0]).init_cfg),
            )
            fit = partial(_fit_inside, elsewhere[0])
        elif elsewhere:
            raise ConfigError(
                f"{'.'.join(filter(None, ['model', elsewhere[0]]))}.init_cfg asks for pretrained weights, "
                "which are read for the backbone, or "
                "for one module inside it; drop it, and start from weights of a whole segmentor with "
                "load_from=PATH"
            )
    return setting, source, fit


def _check_one_source(backbone: Any) -> None:
    """Raises ConfigError where a backbone has two weight files that differ."""
    pretrained = getattr(backbone, "pretrained", None)
    checkpoint = checkpoint_of(getattr(backbone, "init_cfg", None))
    if None not in (pretrained, checkpoint) and str(pretrained) != str(checkpoint):
        raise ConfigError(
            f"model.backbone.pretrained={str(pretrained)!r} and model.backbone.init_cfg.checkpoint="
            f"{str(checkpoint)!r} both name a weight file; drop one of them"
        )


def _existing_file(setting: str, source: Any) -> Path:
    """`source` as a path. Raises ConfigError and CheckpointError where it is none, or nothing is there."""
    with_file, without = (
        (f"--cfg-options {setting}=PATH", f"--cfg-options {setting}=None")
        if setting != "--load-from"
        else ("--load-from PATH", "no --load-from")
    )
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ConfigError(f"{setting}={source!r} must be a path; random weights are had with {without}")
    if "://" in str(source):
        raise CheckpointError(
            f"{setting}={str(source)!r} is an address, and nothing is downloaded here; download the file "
            f"and write {with_file}, "
            f"or start from random weights with {without}"
        )
    if not Path(source).exists():
        raise CheckpointError(
            f"{setting}={str(source)!r}: there is no such file; put the weights there, or start from "
            f"random weights with {without}"
        )
    return Path(source)


def _fit_of_backbones_own_reading(model: Any, own: Weights, path: Path) -> KeyMatch:
    """Of weights that the backbone's class reads in its own way; what they lack keeps its initial values, which
    a warning names."""
    kept = tuple(name for name in plain_names(model.backbone) if name not in own.shapes)
    found = match_backbone(model, own, kept)
    log.warning(
        "%s does not fit by its names alone, and %s reads it in its own way; %s initial values: %s",
        path,
        type(model.backbone).__name__,
        counted(len(found.missing), "tensor keeps its", "tensors keep their"),
        shortened(found.missing) or "none",
    )
    return found


def _fit_inside(part: str, model: Any, weights: Weights, may_differ: tuple[str, ...]) -> KeyMatch:
    return match_part(model, part, weights, may_differ)


def _pretrained_setting(experiment: Experiment, model: Any) -> str:
    """The setting that the backbone's `pretrained` comes from: mmcv's `init_cfg`, or its own argument, which
    mmseg also fills in from `model.pretrained`."""
    init_cfg = experiment.model.backbone.get("init_cfg")
    if init_cfg is not None and checkpoint_of(init_cfg) == pretrained_file(model.backbone):
        return "model.backbone.init_cfg.checkpoint"
    return "model.pretrained" if experiment.model.get("pretrained") else "model.backbone.pretrained"


def check_starting_classes(
    model: Any, fit: KeyMatch, classes: Sequence[str], may_differ: tuple[str, ...]
) -> list[str]:
    """Class scores that a run starts from must be those of the same classes: lines where their names differ.

    fit: of the file that they come from. classes: of the data set. Raises ConfigError for the same names in
    another order, unless `may_differ` (of `engine.weights_may_differ`) covers the scores.
    """
    taken = dict(_scores(model, head, fit) for head in heads(model))
    taken = {part: scores for part, scores in taken.items() if scores}
    known, what = fit.weights.meta.get("CLASSES"), f"the weights of {fit.weights.path}"
    if not taken or not isinstance(known, (list, tuple)) or not all(isinstance(name, str) for name in known):
        return []
    try:
        return check_same_classes(known, classes, what, "data.train")
    except ConfigError as error:
        if all(any(name.startswith(may_differ) for name in scores) for scores in taken.values()):
            return [
                f"{what} and data.train have the same classes in another order, so class scores start as "
                "those of other classes"
            ]
        raise ConfigError(f"{error}; or allow it with engine.weights_may_differ={list(taken)}") from None


def _scores(model: Any, head: nn.Module, fit: KeyMatch) -> tuple[str, list[str]]:
    """The part of a head that makes class scores, all of it where it does not say which, and names of its
    parameters that are taken from a file."""
    part = next(name for name, module in model.named_modules() if module is head)
    part += ".conv_seg" if isinstance(getattr(head, "conv_seg", None), nn.Module) else ""
    return part, [name for name in fit.sources if name.startswith(f"{part}.")]


def check_weights_fit(
    model: Any, checkpoint: str | os.PathLike, *, ema: bool = False, check: bool = True
) -> dict[str, Any]:
    """A finished checkpoint must be there and fit the model (on the meta device); returns its meta (CLASSES,
    PALETTE, ...). check: as for `open_weights`. Raises CheckpointError."""
    weights = open_weights(Path(checkpoint), ema=ema, check=check)
    match_segmentor(model, weights)
    return weights.meta
