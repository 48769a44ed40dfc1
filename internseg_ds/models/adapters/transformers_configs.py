"""The architecture of a vision model of transformers: its configuration, from a folder's config.json or from the
fields that an experiment config names.

Nothing is downloaded and no code beside a config.json is run: what is not there, or not of transformers itself,
is an error that says how to go on.
"""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from internseg_ds.errors import reason_of

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
MAPS = ("out_features", "out_indices", "stage_names")
"""Fields that say which maps transformers' own backbone classes give."""
PRETRAINING = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Fields by which DINOv3 moves and scales its rotary positions at random in training: a part of its
pretraining, which a config has to name to have it."""


def transformers_library() -> ModuleType:
    """The package transformers. Raises ValueError, which names the extra to install, where there is none."""
    try:
        import transformers  # here: it takes seconds, and most runs have no model of it
    except ImportError as error:
        raise ValueError(
            "TransformersBackbone needs transformers: pip install 'internseg_ds[transformers]'"
        ) from error
    return transformers


def vision_config(config: Mapping[str, Any] | str | None, pretrained: str | None) -> Any:
    """transformers' configuration of the vision model alone, also where a folder is of a larger model.

    config: a folder; or the fields, model_type among them; or, without it, those that replace fields of the
    folder `pretrained`. None: as that folder says. Raises ValueError for a folder that is not there or has no
    config.json, and for fields and model types that transformers does not have.
    """
    if isinstance(config, Mapping) and "model_type" in config:
        _check_fields(config["model_type"], config)
        return _without_pretraining(_parsed(dict(config), "config"), config)
    source = config if isinstance(config, str) else pretrained
    if source is None:
        raise ValueError(
            "nothing says which model it is: write pretrained=FOLDER (with its config.json), config=FOLDER, or "
            "config=dict(model_type=..., ...)"
        )
    file = _config_file(str(source), "pretrained" if source is pretrained else "config")
    found = _parsed(_content(file), str(file))
    fields = dict(config) if isinstance(config, Mapping) else {}
    if fields:
        _check_fields(found.model_type, fields)
        kept = {name: value for name, value in found.to_dict().items() if name not in MAPS}
        found = _parsed({**kept, **fields}, str(file))
    return _without_pretraining(found, fields)


def timm_model_of(config: Mapping[str, Any]) -> str | None:
    """The name of timm's model where a config.json is of timm's files; else None."""
    name = config.get("architecture")
    return name if isinstance(name, str) and "model_type" not in config else None


def _config_file(source: str, setting: str) -> Path:
    """The config.json of a folder, or beside a weight file."""
    folder = Path(source)
    if not folder.exists() and HUB_NAME.fullmatch(source):
        name = source.partition("/")[2]
        raise ValueError(
            f"{setting}={source!r} is no folder here, and nothing is downloaded; run huggingface-cli download "
            f"{source} --local-dir pretrained/{name}, and write {setting}='pretrained/{name}'"
        )
    if not folder.exists():
        raise ValueError(f"{setting}={source!r}: there is no such folder")
    file = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{setting}={source!r} has no config.json, which says what model it is; take all files of its page, "
            "or write config=dict(model_type=..., ...)"
        )
    return file


def _content(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({reason_of(error)[:120]}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no object of names; copy it again")
    return found


def _parsed(fields: dict[str, Any], where: str) -> Any:
    """transformers' configuration of these fields, or of the vision model among its parts."""
    kind = fields.get("model_type")
    if (timm_model := timm_model_of(fields)) is not None:
        raise ValueError(
            f'{where} is of timm\'s files: write type="TimmBackbone", model_name="{timm_model}" in place of '
            "TransformersBackbone"
        )
    if not isinstance(kind, str):
        raise ValueError(f"{where} has no model_type, by which transformers knows its models")
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"{where} has a quantization_config: the weights beside it are quantised, and cannot be fine-tuned "
            "here; take the model's unquantised weights"
        )
    whole = _class(kind, fields, where)
    try:
        config = whole.from_dict(fields)
    except Exception as error:  # transformers checks the fields by code of its own
        raise ValueError(f"{where} is no {kind} of transformers: {reason_of(error)}") from error
    return getattr(config, "vision_config", None) or config


def _class(kind: str, fields: Mapping[str, Any], where: str) -> Any:
    """transformers' class of configurations of a model type."""
    transformers = transformers_library()
    known = list(transformers.CONFIG_MAPPING.keys())
    if kind in known:
        return transformers.CONFIG_MAPPING[kind]
    near = difflib.get_close_matches(kind, known, n=3)
    raise ValueError(
        f"{where}: transformers {transformers.__version__} has no model type {kind!r}"
        + (f"; near are {', '.join(map(repr, near))}" if near else "")
        + ("; the model is code in its folder (auto_map), which is never run" if "auto_map" in fields else "")
        + ('; InternViT6B reads InternViT\'s folders: write type="InternViT6B"' if "intern" in kind else "")
    )


def _check_fields(kind: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that the model type does not have: transformers would ignore it."""
    of_kind = _class(kind, fields, "config")
    try:
        defaults = of_kind()
    except Exception as error:  # transformers checks its own defaults by code of its own
        raise ValueError(
            f"transformers' {kind} has no configuration by default ({type(error).__name__}); give the folder of "
            "a config.json"
        ) from error
    known = {*defaults.to_dict(), *defaults.attribute_map, "model_type", "torch_dtype"}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            raise ValueError(
                f"config has the field {name!r}, which transformers' {kind} does not have"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _without_pretraining(config: Any, named: Mapping[str, Any]) -> Any:
    """`config` without the fields of PRETRAINING that are not named."""
    for field in PRETRAINING:
        if hasattr(config, field) and field not in named:
            setattr(config, field, None)
    return config
