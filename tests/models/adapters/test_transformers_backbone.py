"""transformers' models as backbones: transformers' own features, layers and weights, at any size and in bf16."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from mmcv import ConfigDict
from mmseg.models import build_backbone
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

from internseg_ds.distributed.initial_values import initialise
from internseg_ds.models.layers import DropPath
from internseg_ds.models.repeated_blocks import repeated_block
from internseg_ds.torch_internals import fake_tensor_mode

SMALL = dict(hidden_size=48, num_attention_heads=3, num_hidden_layers=4)
VIT = dict(SMALL, intermediate_size=96)
PLAIN = {  # model type -> fields, and the sides of an image that is not square
    "dinov3_vit": (dict(VIT, num_register_tokens=4), (48, 80)),
    "dinov2": (dict(SMALL, mlp_ratio=2, image_size=56, use_swiglu_ffn=True), (42, 70)),
    "dinov2_with_registers": (dict(SMALL, mlp_ratio=2, image_size=56, patch_size=14), (42, 70)),
    "internvl_vision": (
        dict(VIT, image_size=56, patch_size=14, use_qk_norm=True, norm_type="rms_norm"),
        (42, 70),
    ),
    "siglip_vision_model": (dict(VIT, image_size=64), (48, 80)),
    "siglip2_vision_model": (dict(VIT, num_patches=16), (48, 80)),
    "aimv2_vision_model": (dict(VIT, patch_size=14, is_native=True), (42, 70)),
    "radio": (dict(SMALL, max_img_size=64, layerscale_value=0.5), (48, 80)),
    "clip_vision_model": (dict(VIT, image_size=64, patch_size=16), (48, 80)),
    "vit": (dict(VIT, image_size=64), (48, 80)),
}
STAGED = {
    "swin": dict(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]),
    "convnext": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    "convnextv2": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
    "dinov3_convnext": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
}
GIANTS = {  # name -> configuration, and billions of parameters without a pooling head
    "DINOv3 ViT-7B/16": (
        dict(
            model_type="dinov3_vit",
            hidden_size=4096,
            intermediate_size=8192,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_register_tokens=4,
            use_gated_mlp=True,
            query_bias=False,
            value_bias=False,
            patch_size=16,
        ),
        6.716,
    ),
    "InternViT-6B V2.5": (
        dict(
            model_type="internvl_vision",
            hidden_size=3200,
            intermediate_size=12800,
            num_hidden_layers=45,
            num_attention_heads=25,
            use_qk_norm=True,
            norm_type="rms_norm",
            image_size=[448, 448],
            patch_size=[14, 14],
        ),
        5.536,
    ),
    "InternViT-300M V2.5": (
        dict(
            model_type="internvl_vision",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            attention_bias=True,
            image_size=[448, 448],
            patch_size=[14, 14],
        ),
        0.304,
    ),
    "SigLIP2 giant-opt/16": (
        dict(
            model_type="siglip_vision_model",
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=40,
            num_attention_heads=16,
            image_size=384,
        ),
        1.135,
    ),
    "AIMv2 3B/14": (
        dict(
            model_type="aimv2_vision_model",
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=24,
            num_attention_heads=24,
            image_size=448,
        ),
        2.723,
    ),
}


def backbone(config=None, **arguments) -> nn.Module:
    return build_backbone(ConfigDict(type="TransformersBackbone", config=config, **arguments))


def tiny(kind: str, **arguments) -> nn.Module:
    """A small member of a family, with transformers' initial values."""
    fields = PLAIN[kind][0] if kind in PLAIN else STAGED[kind]
    model = backbone(dict(model_type=kind, **fields), **arguments)
    initialise(nn.ModuleDict({"backbone": model}), 0, torch.float32)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """With other parameters: layer scales that begin near 0 hide what is inside a block."""
    torch.manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


def theirs(kind: str, **more) -> nn.Module:
    """transformers' own model of the same configuration."""
    fields = PLAIN[kind][0] if kind in PLAIN else STAGED[kind]
    config = transformers.CONFIG_MAPPING[kind](**fields | more)
    mapping = MODEL_MAPPING if kind in PLAIN else MODEL_FOR_BACKBONE_MAPPING
    return mapping[type(config)](config).eval()


def hidden_states(model: nn.Module, kind: str, image: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of all blocks as maps, as transformers gives them for the same image."""
    patch = model.config.patch_size
    grid = (image.shape[2] // patch, image.shape[3] // patch) if isinstance(patch, int) else None
    grid = grid or (image.shape[2] // patch[0], image.shape[3] // patch[1])
    inputs = dict(pixel_values=image)
    if kind == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        inputs = dict(
            pixel_values=torch.stack([convert_image_to_patches(each, patch) for each in image]),
            pixel_attention_mask=torch.ones(len(image), grid[0] * grid[1]),
            spatial_shapes=torch.tensor([grid] * len(image)),
        )
    elif kind in ("siglip_vision_model", "clip_vision_model", "vit"):
        inputs["interpolate_pos_encoding"] = True
    states = model(**inputs, output_hidden_states=True).hidden_states[1:]
    return [state[:, -grid[0] * grid[1] :].mT.unflatten(2, grid) for state in states]


@pytest.mark.parametrize("kind", PLAIN)
def test_features_are_transformers_hidden_states_at_any_size(kind):
    model = shaken(tiny(kind, out_indices=(0, 2))).eval()
    image = torch.randn(2, 3, *PLAIN[kind][1])
    reference = theirs(kind)
    missing, unexpected = reference.load_state_dict(model.model.state_dict(), strict=False)
    extras = {name.removeprefix("model.") for name in model.pretrained_extras}
    assert not unexpected and set(missing) == extras & reference.state_dict().keys()
    assert all(
        name.startswith(("encoder.layer", "model.layer.3.", "layers.3.", "head", "pooler"))
        for name in missing
    )
    with torch.no_grad():
        expected = hidden_states(reference, kind, image)
        found = model(image)
    assert [features.shape for features in found] == [expected[0].shape, expected[2].shape]
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    assert torch.allclose(found[1], expected[2], atol=1e-5)
    assert float(found[-1].std()) > 0.1
    assert model.channels == (48, 48)


def test_a_model_without_register_tokens_has_no_parameter_for_them():
    fields = dict(PLAIN["dinov3_vit"][0], model_type="dinov3_vit", num_register_tokens=0)
    model = backbone(fields).eval()
    assert all(param.numel() for param in model.parameters())
    assert "model.embeddings.register_tokens" in model.pretrained_extras  # a file of transformers' has it
    reference = theirs("dinov3_vit", num_register_tokens=0)
    missing, _ = reference.load_state_dict(model.model.state_dict(), strict=False)
    assert "embeddings.register_tokens" in missing
    image = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        assert torch.allclose(model(image)[-1], hidden_states(reference, "dinov3_vit", image)[-1], atol=1e-5)
        assert model.bfloat16()(image.bfloat16())[-1].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", STAGED)
def test_maps_of_stages_are_those_of_transformers_backbones(kind):
    model = shaken(tiny(kind)).eval()
    reference = theirs(kind, out_indices=[1, 2, 3, 4])
    reference.load_state_dict(model.model.state_dict())
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = reference(image).feature_maps, model(image)
    assert len(found) == 4 and all(torch.equal(ours, its) for ours, its in zip(found, expected))
    assert model.channels == tuple(features.shape[1] for features in found)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("300M" in name)) for name in GIANTS]
)
def test_giants_are_built_and_run_on_the_meta_device(name):
    config, billions = GIANTS[name]
    with torch.device("meta"):
        model = backbone(config).train()
        maps = model(torch.empty(1, 3, 448, 448))
    assert len(maps) == 4 and {features.shape[1] for features in maps} == {config["hidden_size"]}
    assert round(sum(param.numel() for param in model.parameters()) / 1e9, 3) == billions
    block = repeated_block(model)
    assert block is not None and len(model._blocks) == config["num_hidden_layers"] == model.depth


def test_final_norm_is_transformers_last_norm():
    model, reference = shaken(tiny("dinov3_vit", final_norm=True)).eval(), theirs("dinov3_vit")
    reference.load_state_dict(model.model.state_dict())
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = reference(image).last_hidden_state[:, 5:].mT.unflatten(2, (3, 3))
        assert torch.allclose(model(image)[-1], expected, atol=1e-5)
    assert model.model.norm.weight.requires_grad


TIMM_BLOCK = {  # timm's DINOv3 -> transformers'
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "gamma_1": "layer_scale1.lambda1",
    "gamma_2": "layer_scale2.lambda1",
}


def timm_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' DINOv3 under the names of timm's."""
    found = {
        "cls_token": state["embeddings.cls_token"],
        "reg_token": state["embeddings.register_tokens"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    for n in range(4):
        ours, theirs = f"blocks.{n}", f"model.layer.{n}"
        qkv = [state[f"{theirs}.attention.{part}_proj.weight"] for part in "qkv"]
        found[f"{ours}.attn.qkv.weight"] = torch.cat(qkv)
        for a, b in TIMM_BLOCK.items():
            for leaf in ("", ".weight", ".bias"):
                if f"{theirs}.{b}{leaf}" in state:
                    found[f"{ours}.{a}{leaf}"] = state[f"{theirs}.{b}{leaf}"]
    return found


def test_dinov3_of_transformers_and_of_timm_have_the_same_features():
    fields = dict(VIT, num_register_tokens=4, query_bias=False, value_bias=False, layer_norm_eps=1e-5)
    model = shaken(backbone(dict(model_type="dinov3_vit", **fields))).eval()
    small = dict(embed_dim=48, depth=4, num_heads=3, mlp_ratio=2)
    other = build_backbone(
        ConfigDict(type="TimmBackbone", model_name="vit_small_patch16_dinov3", model_args=small)
    ).eval()
    weights = timm_weights(model.model.state_dict())
    reference = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **small)
    reference.load_state_dict(weights)  # strict: the map above is complete
    other.model.load_state_dict({name: weights[name] for name in other.model.state_dict()})
    image = torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        for ours, its in zip(model(image), other(image), strict=True):
            assert torch.allclose(ours, its, atol=1e-5)


@pytest.mark.parametrize("kind", [*PLAIN, *STAGED])
def test_every_parameter_trains_or_is_frozen(kind):
    indices = (0, 2)
    model = shaken(tiny(kind, out_indices=indices)).train()
    image = torch.randn(2, 3, *PLAIN[kind][1] if kind in PLAIN else (64, 96))
    sum(features.square().mean() for features in model(image)).backward()
    for name, param in model.named_parameters():
        assert param.requires_grad == (param.grad is not None), name
        assert 0 <= model.layer_id(name) <= model.depth + 1
    if kind in PLAIN:
        assert model.depth == 3


def test_layers_are_numbered_by_blocks():
    model = tiny("dinov3_vit")
    assert model.depth == 4
    assert model.layer_id("model.embeddings.cls_token") == 0
    assert [model.layer_id(f"model.model.layer.{n}.mlp.up_proj.weight") for n in range(4)] == [1, 2, 3, 4]
    assert model.layer_id("model.norm.weight") == 5
    levels = tiny("convnext", neck=dict(type="FPN", out_channels=8, num_outs=4))
    assert levels.depth == 5 and levels.layer_id("model.encoder.stages.0.layers.0.dwconv.weight") == 1
    assert levels.layer_id("model.hidden_states_norms.stage1.weight") == 6
    assert {levels.layer_id(name) for name, _ in levels.named_parameters() if name.startswith("neck")} == {6}


TIMMS_NAMES = {  # of a model of stages -> timm's model and fields, and transformers' names in timm's words
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(embed_dim=12, num_heads=(1, 2, 4, 8)),
        (
            (r"^swin\.embeddings\.", "patch_embed."),
            (r"^swin\.encoder\.layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample"),
            (r"^swin\.encoder\.layers", "layers"),
            (r"^swin\.layernorm", "norm"),
        ),
    ),
    "convnext": (
        "convnext_atto",
        dict(dims=(8, 16, 24, 32)),
        (
            (r"^embeddings\.", "stem."),
            (r"^encoder\.stages\.(\d)\.downsampling_layer", r"stages.\1.downsample"),
            (r"^encoder\.stages\.(\d)\.layers", r"stages.\1.blocks"),
        ),
    ),
}


def block_of(name: str) -> str:
    """A stage's block or other part, or else the first word of a parameter's name."""
    found = re.match(r"(layers|stages)\.\d+\.\w+(\.\d+)?", name)
    return found[0] if found else name.partition(".")[0]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 1, 2)])
@pytest.mark.parametrize("depths", [[2, 2, 4, 2], [1, 1, 1, 1]])  # the latter repeat no block
@pytest.mark.parametrize("kind", TIMMS_NAMES)
def test_the_layers_of_stages_are_timms_groups(kind, depths, out_indices):
    theirs_name, fields, renaming = TIMMS_NAMES[kind]
    with torch.device("meta"):
        model = backbone(dict(STAGED[kind], model_type=kind, depths=depths), out_indices=out_indices)
        other = build_backbone(
            ConfigDict(
                type="TimmBackbone",
                model_name=theirs_name,
                out_indices=out_indices,
                model_args=dict(fields, depths=depths),
            )
        )
    assert model.depth == other.depth == sum(depths[: len(out_indices)])
    groups: dict[str, set[int]] = {}
    for name, _ in other.named_parameters():
        part = name.removeprefix("model.")
        groups.setdefault(block_of(part), set()).add(other.layer_id(name))
    compared = 0
    for name, param in model.named_parameters():
        part = name.removeprefix("model.")
        for pattern, replacement in renaming:
            part = re.sub(pattern, replacement, part)
        group = block_of(part)
        if param.requires_grad and not part.startswith("hidden_states_norms"):
            assert groups[group] == {model.layer_id(name)}, (name, group)
            compared += 1
    assert compared > 20
    norms = [name for name, _ in model.named_parameters() if "hidden_states_norms" in name]
    assert norms and {model.layer_id(name) for name in norms} == {model.depth + 1}


@pytest.mark.parametrize("kind", ["bit", "focalnet", "hiera", "pvt_v2", "resnet", "swinv2", "textnet"])
def test_every_model_of_stages_has_as_many_layers_as_blocks(kind):
    with torch.device("meta"):
        model = backbone(dict(model_type=kind))
    assert model.depth == sum(model.model.config.depths)
    assert {model.layer_id(name) for name, _ in model.named_parameters()} >= set(range(model.depth + 1))


@pytest.mark.parametrize("kind", ["dinov3_vit", "swin"])
def test_every_checkpointing_policy_gives_the_same_gradients(kind):
    image = torch.randn(2, 3, 64, 96)
    gradients = {}
    for policy in ("none", "blocks", 2, "all_but_matmuls"):
        model = tiny(kind, drop_path_rate=0.2, with_cp=policy != "none").train()
        model.recomputation = policy
        torch.manual_seed(1)
        sum(features.square().mean() for features in model(image)).backward()
        gradients[policy] = {
            key: param.grad for key, param in model.named_parameters() if param.requires_grad
        }
    for policy, found in gradients.items():
        assert all(torch.equal(found[key], value) for key, value in gradients["none"].items()), policy


def kept_elements(model: nn.Module, image: torch.Tensor) -> int:
    """What a forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model(image)
    return sum(sizes)


def test_checkpointing_keeps_less():
    image = torch.randn(1, 3, 112, 112)
    kept = [kept_elements(tiny("internvl_vision", with_cp=on).train(), image) for on in (False, True)]
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("kind", ["dinov3_vit", "internvl_vision"])
def test_drop_path_grows_with_depth_whether_transformers_has_it_or_not(kind):
    model = tiny(kind, drop_path_rate=0.75).train()
    rates = [
        {module.drop_prob for module in block.modules() if isinstance(module, DropPath)}
        for block in model._blocks
    ]
    assert rates == [{0.0}, {0.25}, {0.5}, {0.75}]
    block, tokens = model._blocks[3], torch.randn(64, 5, 48)
    branch = (
        (lambda: block.drop_path(tokens)) if kind == "dinov3_vit" else (lambda: block.attention(tokens)[0])
    )
    torch.manual_seed(0)
    dropped = branch()
    expected = (block.eval(), branch())[1]
    kept = dropped.flatten(1).any(1)
    assert 4 < int(kept.sum()) < 32  # of 64, a quarter is to be expected
    assert torch.allclose(dropped[kept], expected[kept] / 0.25)


def test_drop_path_is_refused_where_a_model_has_none():
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1,.*resnet"):
        backbone(dict(model_type="resnet"), drop_path_rate=0.1)


def test_initial_values_are_of_transformers_distributions_and_follow_the_seed():
    first, again = tiny("dinov3_vit"), tiny("dinov3_vit")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    block = first.model.model.layer[0]
    assert float(block.mlp.up_proj.weight.std()) == pytest.approx(0.02, rel=0.1)  # initializer_range
    assert not torch.equal(block.mlp.up_proj.weight, first.model.model.layer[1].mlp.up_proj.weight)
    assert float(block.mlp.up_proj.bias.abs().max()) == 0
    siglip = tiny("siglip_vision_model").model.embeddings.position_embedding.weight
    assert float(siglip.std()) == pytest.approx(48**-0.5, rel=0.1)


def test_built_without_the_engine_it_has_initial_values_too():
    torch.manual_seed(0)
    model = backbone(dict(model_type="convnext", **STAGED["convnext"]))
    assert {float(p.mean()) for n, p in model.named_parameters() if "layernorm.weight" in n} == {1.0}


@pytest.mark.parametrize("kind", ["dinov3_vit", "siglip_vision_model", "siglip2_vision_model"])
def test_a_bf16_model_gives_the_features_to_bf16_rounding(kind):
    exact = shaken(tiny(kind)).eval()
    image = torch.randn(1, 3, 320, 320)
    rounded = tiny(kind).eval()
    rounded.load_state_dict(exact.state_dict())
    for param in rounded.parameters():
        param.data = param.data.bfloat16()
    with torch.no_grad():
        expected, found = exact(image)[-1], rounded(image.bfloat16())[-1]
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02
    assert all(buffer.dtype == torch.float32 for buffer in rounded.buffers() if buffer.is_floating_point())


def test_a_pass_without_values_leaves_none_behind():
    """transformers keeps the positions of DINOv3's patches from one pass for the next."""
    model, image = tiny("dinov3_vit").eval(), torch.randn(1, 3, 112, 80)
    with torch.no_grad():
        expected = model(image)[0]
        with fake_tensor_mode(allow_non_fake_inputs=True):
            model(torch.empty(1, 3, 48, 112))
        assert torch.equal(model(image)[0], expected)
        assert type(model(torch.randn(1, 3, 48, 112))[0]) is torch.Tensor


def test_random_scales_of_dinov3s_pretraining_are_used_where_they_are_named():
    image = torch.randn(1, 3, 48, 80)
    for named in (False, True):
        fields = dict(PLAIN["dinov3_vit"][0], **(dict(pos_embed_rescale=2.0) if named else {}))
        model = backbone(dict(model_type="dinov3_vit", **fields)).train()
        shaken(model)
        torch.manual_seed(0)
        assert torch.equal(model(image)[0], model(image)[0]) != named


def test_frozen_it_neither_trains_nor_drops():
    model = tiny("dinov3_vit", freeze=True, drop_path_rate=0.9).train()
    image = torch.randn(1, 3, 48, 48)
    assert not any(param.requires_grad for param in model.parameters())
    assert torch.equal(model(image)[0], model(image)[0]) and not model(image)[0].requires_grad


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(config=dict(model_type="dinov3_vitt")), "no model type 'dinov3_vitt'; near are .*'dinov3_vit'"),
        (dict(config=dict(model_type="intern_vit_6b", auto_map={})), "auto_map.*never run.*InternViT6B"),
        (dict(config=dict(model_type="bert")), "neither a plain vision transformer nor a backbone"),
        (
            dict(config=dict(model_type="dinov3_vit", hiden_size=48)),
            "'hiden_size'.* did you mean 'hidden_size'",
        ),
        (dict(config=dict(model_type="dinov3_vit", hidden_size="48")), "config is no dinov3_vit"),
        (dict(config=dict(hidden_size=48)), "nothing says which model it is: write pretrained=FOLDER"),
        (
            dict(pretrained="facebook/dinov3-vit7b16-pretrain-lvd1689m"),
            "huggingface-cli download facebook/dinov3",
        ),
        (dict(pretrained="/no/such/folder"), "there is no such folder"),
        (dict(pretrained=str(Path(__file__).parent)), "has no config.json"),
        (dict(config=dict(model_type="vit"), out_indices=(3, 12)), r"out_indices=\[3, 12\] .* 0 to 11"),
        (dict(config=dict(model_type="radio"), final_norm=True), "no last norm"),
        (dict(config=dict(model_type="swin"), final_norm=True), "norms of their own"),
        (dict(config=dict(model_type="vit"), drop_path_rate=1), "drop-path rate of 1"),
    ],
)
def test_what_transformers_does_not_have_is_said(arguments, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        backbone(**arguments)


def test_quantised_weights_are_refused(tmp_path):
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    content = {"model_type": "dinov3_vit", **VIT, "quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json has a quantization_config.*cannot be fine-tuned"):
        backbone(pretrained=str(tmp_path))


def test_images_of_sizes_that_a_model_cannot_take_are_refused():
    fixed = backbone(dict(model_type="aimv2_vision_model", **dict(VIT, patch_size=14, image_size=56)))
    assert fixed(torch.randn(1, 3, 56, 56))[0].shape == (1, 48, 4, 4)
    with pytest.raises(ValueError, match=r"56 x 56 pixels.* 70 x 56"):
        fixed(torch.randn(1, 3, 70, 56))
    with pytest.raises(ValueError, match="patch size 14 x 14"):
        fixed(torch.randn(1, 3, 60, 56))


def test_a_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'internseg_ds\[transformers\]'"):
        backbone(dict(model_type="dinov3_vit"))


def folder_of(kind: str, folder: Path, **more) -> Path:
    """A folder as transformers writes it."""
    shaken(theirs(kind, **more)).save_pretrained(folder)
    return folder


def test_a_folder_alone_says_what_it_is_and_fields_replace_its_own(tmp_path):
    folder = folder_of("dinov2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pos_embed_rescale": 2.0}))
    model = backbone(pretrained=str(folder))
    assert model.model.config.use_swiglu_ffn and model.patch_size == (14, 14)
    assert backbone(dict(num_hidden_layers=2), pretrained=str(folder)).depth == 2
    larger = backbone(dict(image_size=112), pretrained=str(folder), out_indices=(1,))
    assert larger.model.embeddings.position_embeddings.shape == (1, 65, 48) and larger.depth == 2
    in_file, in_model = torch.Size([1, 17, 48]), torch.Size([1, 65, 48])
    fits, resize = larger.resizable["model.embeddings.position_embeddings"]
    assert fits(in_file, in_model) and not fits(torch.Size([1, 16, 48]), in_model)
    embedding = torch.randn(in_file)
    reference = theirs("dinov2").embeddings
    reference.position_embeddings.data = embedding
    with torch.no_grad():
        expected = reference.interpolate_pos_encoding(torch.empty(1, 65, 48), 112, 112)
    assert torch.allclose(resize(embedding, in_model), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["dinov2", "siglip_vision_model", "swin"])
def test_what_it_states_builds_it_without_its_folder(kind, tmp_path):
    folder = folder_of(kind, tmp_path / "published")
    model = backbone(pretrained=str(folder), out_indices=(0, 1))
    shutil.rmtree(folder)
    again = backbone(**json.loads(json.dumps(model.stated)), pretrained=str(folder), out_indices=(0, 1))
    assert again.model.config.to_dict() == model.model.config.to_dict()
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }


def test_internvit_of_transformers_has_the_features_of_ours():
    ours = build_backbone(
        ConfigDict(
            type="InternViT6B",
            **dict(embed_dim=48, num_heads=3, depth=4, mlp_ratio=2, img_size=56, out_indices=(0, 1, 2, 3)),
            use_flash_attn=False,
        )
    )
    shaken(ours).eval()
    names, config = ours.exported("transformers")
    model = backbone(config).eval()
    state = ours.state_dict()
    renamed = {
        key: part
        for own, keys in names.items()
        if own in state
        for key, part in zip(keys, state[own].chunk(len(keys)))
    }
    assert renamed.keys() == model.model.state_dict().keys()
    model.model.load_state_dict(renamed)
    image = torch.randn(2, 3, 42, 70)
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model(image), ours(image), strict=True))
