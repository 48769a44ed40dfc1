"""How the images were normalised that published weights were trained on, by the files beside them. What is not
known is left out: it serves a warning alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Normalizations = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
"""Mean and standard deviation, of RGB from 0 to 255; several where weights of one model differ."""


def timm_normalizations(model_name: str, pretrained: Any) -> Normalizations:
    """Of the weights `pretrained` in timm's layout, by the config.json beside them, or else of all weights that
    timm knows of the model; none where nothing is loaded."""
    from timm.models import get_arch_pretrained_cfgs

    if pretrained is None:
        return ()
    stated = _object_beside(pretrained, "config.json").get("pretrained_cfg")
    if isinstance(stated, Mapping):
        return _normalizations([stated], "mean", "std")
    known = get_arch_pretrained_cfgs(model_name.partition(".")[0])
    return _normalizations(map(vars, known.values()), "mean", "std")


def transformers_normalizations(pretrained: Any) -> Normalizations:
    """Of the folder `pretrained`, by its preprocessor_config.json."""
    if pretrained is None:
        return ()
    stated = _object_beside(pretrained, "preprocessor_config.json")
    # images that are not scaled to 0..1 before; other scales are rare, and not compared
    of_1 = (
        stated.get("do_rescale", True) and abs(255 * float(stated.get("rescale_factor", 1 / 255)) - 1) < 0.01
    )
    if not of_1 or not stated.get("do_normalize", True):
        return ()
    return _normalizations([stated], "image_mean", "image_std")


def _object_beside(weights: Any, name: str) -> dict[str, Any]:
    """The JSON object of a file in a folder of weights, or beside a weight file; empty where there is none."""
    path = Path(str(weights))
    try:
        found = json.loads(((path if path.is_dir() else path.parent) / name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _normalizations(known: Iterable[Mapping[str, Any]], mean: str, std: str) -> Normalizations:
    complete = [each for each in known if _is_rgb(each.get(mean)) and _is_rgb(each.get(std))]
    return tuple(sorted({(_of_255(each[mean]), _of_255(each[std])) for each in complete}))


def _is_rgb(values: Any) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(isinstance(value, (int, float)) for value in values)
    )


def _of_255(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(255 * float(value), 3) for value in values)
