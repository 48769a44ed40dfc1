"""Vision models of transformers, built without what no feature map depends on: plain transformers, and models of
stages."""

from collections.abc import Sequence
from typing import Any

from internseg_ds.errors import reason_of
from internseg_ds.models.adapters.transformers_configs import transformers_library
from internseg_ds.models.adapters.transformers_plain import BRANCHES, PlainModel
from internseg_ds.models.adapters.transformers_staged import StagedModel
from internseg_ds.models.layers import DropPath


def build(
    config: Any, out_indices: Sequence[int] | None, drop_path_rate: float, *, final_norm: bool
) -> PlainModel | StagedModel:
    """The model of a configuration of transformers, whose values are undefined until `draw_values`.

    Raises ValueError for models that are no vision backbones, and for settings that they do not have.
    """
    DropPath(drop_path_rate)  # raises for what is no probability
    if hasattr(config, "drop_path_rate"):
        if config.drop_path_rate != drop_path_rate:  # LeViT's is a whole number
            config.drop_path_rate = float(drop_path_rate)
    elif drop_path_rate and config.model_type not in BRANCHES:
        raise ValueError(f"drop_path_rate={drop_path_rate:g}, but transformers' {config.model_type} has none")
    config.dtype = None  # of the file; the engine chooses that of the parameters
    for name, value in list(vars(config).items()):
        if isinstance(value, tuple):  # of defaults; some classes add lists to them
            setattr(config, name, list(value))
    transformers_library()
    from transformers.models.auto import modeling_auto

    if hasattr(config, "depths") and type(config) in modeling_auto.MODEL_FOR_BACKBONE_MAPPING:
        kind = modeling_auto.MODEL_FOR_BACKBONE_MAPPING[type(config)]
        try:
            return StagedModel(kind, config, out_indices, final_norm=final_norm)
        except ImportError as error:
            raise ValueError(
                f"transformers' {config.model_type} needs another package: {reason_of(error)[:160]}"
            ) from error
    fields = ("num_hidden_layers", "hidden_size", "patch_size")
    if type(config) not in modeling_auto.MODEL_MAPPING or not all(hasattr(config, name) for name in fields):
        raise ValueError(
            f"transformers' {config.model_type} is neither a plain vision transformer nor a backbone of stages; "
            "timm (TimmBackbone) or mmseg may have it: SegFormer is mmseg's MixVisionTransformer"
        )
    kind = modeling_auto.MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return PlainModel(kind, config, out_indices, drop_path_rate, final_norm=final_norm)


def draw_values(model: Any) -> None:
    """Draw the initial values of a model of transformers, its tables included, as its class does."""
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)  # it would keep what it has drawn before
    model.initialize_weights()
