"""The keys of published InternViT weight files for the parameters of `intern_vit_6b.py`. Names only: no
tensor is read, cast or copied here.

There are three layouts: InternVL's .pth, whose keys are our names; the folders of OpenGVLab (remote code);
and transformers' own InternVLVisionModel, which stores queries, keys and values in three tensors. In a chat
model the vision tower's keys have a prefix, beside the keys of the language model. "ours -> theirs" is a dict
from a parameter name to the keys in the file; several keys are concatenated along the first dimension.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

LINEAR = ("weight", "bias")


@dataclass(frozen=True)
class Layout:
    """The keys of one layout."""

    mark: str
    """A key that only this layout has."""
    embeddings: dict[str, tuple[str, ...]]
    """ours -> theirs, of what stands before the blocks."""
    block: dict[str, tuple[str, ...]]
    """ours -> theirs of one block; {n} in a key is the number of the block."""

    def names(self, depth: int) -> dict[str, tuple[str, ...]]:
        """ours -> theirs of every parameter that a backbone of `depth` blocks may have, with all norms and
        biases."""
        blocks = {
            f"blocks.{n}.{ours}": tuple(name.format(n=n) for name in theirs)
            for n in range(depth)
            for ours, theirs in self.block.items()
        }
        return self.embeddings | blocks


OPENGVLAB = Layout(
    mark="embeddings.class_embedding",
    embeddings={
        "cls_token": ("embeddings.class_embedding",),
        "pos_embed": ("embeddings.position_embedding",),
        **{f"patch_embed.proj.{leaf}": (f"embeddings.patch_embedding.{leaf}",) for leaf in LINEAR},
    },
    block={
        **{
            f"{module}.{leaf}": (f"encoder.layers.{{n}}.{module}.{leaf}",)
            for leaf in LINEAR
            for module in (
                "norm1",
                "attn.qkv",
                "attn.q_norm",
                "attn.k_norm",
                "attn.proj",
                "norm2",
                "mlp.fc1",
                "mlp.fc2",
            )
        },
        **{f"{scale}.gamma": (f"encoder.layers.{{n}}.{scale}",) for scale in ("ls1", "ls2")},
    },
)
TRANSFORMERS = Layout(
    mark="embeddings.cls_token",
    embeddings={
        "cls_token": ("embeddings.cls_token",),
        "pos_embed": ("embeddings.position_embeddings",),
        **{
            f"patch_embed.proj.{leaf}": (f"embeddings.patch_embeddings.projection.{leaf}",) for leaf in LINEAR
        },
    },
    block={
        **{
            f"{ours}.{leaf}": (f"encoder.layer.{{n}}.{theirs}.{leaf}",)
            for leaf in LINEAR
            for ours, theirs in {
                "norm1": "layernorm_before",
                "attn.q_norm": "attention.q_norm",
                "attn.k_norm": "attention.k_norm",
                "attn.proj": "attention.projection_layer",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
        },
        **{
            f"attn.qkv.{leaf}": tuple(f"encoder.layer.{{n}}.attention.{part}_proj.{leaf}" for part in "qkv")
            for leaf in LINEAR
        },
        **{f"ls{number}.gamma": (f"encoder.layer.{{n}}.lambda_{number}",) for number in (1, 2)},
    },
)
LAYOUTS = {"opengvlab": OPENGVLAB, "transformers": TRANSFORMERS}


def published_sources(names: Collection[str]) -> tuple[str, dict[str, tuple[str, ...]]] | None:
    """Where a file with these keys holds our parameters: (prefix of the vision tower, ours -> theirs), or
    None when the keys are of neither folder layout."""
    for layout in LAYOUTS.values():
        for name in names:
            if name == layout.mark or name.endswith("." + layout.mark):
                prefix = name.removesuffix(layout.mark)
                present = set(names)
                known = {
                    ours: tuple(prefix + key for key in theirs)
                    for ours, theirs in layout.names(_depth(names, prefix)).items()
                }
                return prefix, {ours: theirs for ours, theirs in known.items() if present.issuperset(theirs)}
    return None


def recognises(names: Collection[str], config: Mapping[str, Any] | None) -> str | None:
    """How a config names InternViT6B for a file of InternViT, in any layout but InternVL's .pth, whose keys
    other models have too."""
    marks = ("encoder.layers.0.attn.qkv.weight", "encoder.layer.0.attention.projection_layer.weight")
    return 'type="InternViT6B"' if any(name.endswith(marks) for name in names) else None


def _depth(names: Collection[str], prefix: str) -> int:
    """Number of blocks of the vision tower: keys are encoder.layer.N... or encoder.layers.N... behind the
    prefix."""
    parts = (name.removeprefix(prefix).split(".") for name in names if name.startswith(prefix + "encoder."))
    numbers = [int(part[2]) for part in parts if len(part) > 2 and part[2].isdigit()]
    return max(numbers, default=-1) + 1


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of InternViT6B that a config.json of either folder layout states; those of
    its `vision_config` where it has one."""
    config = config.get("vision_config") or config
    stated = {
        "embed_dim": config.get("hidden_size"),
        "num_heads": config.get("num_attention_heads"),
        "depth": config.get("num_hidden_layers"),
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"]
        if {"intermediate_size", "hidden_size"} <= config.keys()
        else None,
        "qkv_bias": config.get("qkv_bias", config.get("attention_bias")),
        "qk_normalization": config.get("qk_normalization", config.get("use_qk_norm")),
        "norm_type": config.get("norm_type"),
        "layer_norm_eps": config.get("layer_norm_eps"),
    }
    return {name: value for name, value in stated.items() if value is not None}


def exported_names(layout: str, depth: int) -> dict[str, tuple[str, ...]]:
    """ours -> theirs for every ViT parameter in a layout: "internvl" (our own names, as in InternVL's .pth),
    "opengvlab" or "transformers"."""
    if layout == "internvl":
        return {ours: (ours,) for ours in OPENGVLAB.names(depth)}
    return LAYOUTS[layout].names(depth)


def exported_config(
    layout: str, arguments: Mapping[str, Any], img_size: int, patch_size: int, init_values: float
) -> dict[str, Any] | None:
    """The config.json of a folder in a layout; None for "internvl", which has none. OpenGVLab's folder needs
    its two .py files beside it (remote code).

    arguments: InternViT6B's `arguments`; the others are its constructor arguments of these names.
    """
    width = arguments["embed_dim"]
    common = {
        "hidden_size": width,
        "num_attention_heads": arguments["num_heads"],
        "num_hidden_layers": arguments["depth"],
        "intermediate_size": int(width * arguments["mlp_ratio"]),
        "norm_type": arguments["norm_type"],
        "layer_norm_eps": arguments["layer_norm_eps"],
        "hidden_act": "gelu",
        "num_channels": arguments["in_chans"],
        "torch_dtype": "float32",
    }
    if layout == "opengvlab":
        return common | {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "qkv_bias": arguments["qkv_bias"],
            "qk_normalization": arguments["qk_normalization"],
            "image_size": img_size,
            "patch_size": patch_size,
            "initializer_factor": init_values,
            "auto_map": {
                "AutoConfig": "configuration_intern_vit.InternVisionConfig",
                "AutoModel": "modeling_intern_vit.InternVisionModel",
            },
        }
    if layout == "transformers":
        return common | {
            "architectures": ["InternVLVisionModel"],
            "model_type": "internvl_vision",
            "attention_bias": arguments["qkv_bias"],
            "use_qk_norm": arguments["qk_normalization"],
            "image_size": [img_size, img_size],
            "patch_size": [patch_size, patch_size],
            "layer_scale_init_value": init_values,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
        }
    return None
