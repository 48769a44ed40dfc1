"""timm's models as backbones: timm's own features, layers and weights, at any size and in bf16."""

import pytest
import timm
import torch
from mmcv import ConfigDict
from mmseg.models import build_backbone
from torch import nn

from internseg_ds.distributed.batch_norms import allow_any_device
from internseg_ds.distributed.initial_values import initialise
from internseg_ds.models.activation_checkpointing import set_recomputation
from internseg_ds.models.repeated_blocks import repeated_block

MEMBERS = {  # model -> arguments, and the sides of an image that is not square
    "vit_small_patch16_dinov3": (dict(embed_dim=48, depth=4, num_heads=3), (48, 80)),
    "vit_small_patch14_reg4_dinov2": (dict(embed_dim=48, depth=4, num_heads=3), (42, 70)),
    "vit_pe_spatial_tiny_patch16_512": (dict(embed_dim=48, depth=4, num_heads=3), (48, 80)),
    "vit_base_patch16_siglip_224": (dict(embed_dim=48, depth=4, num_heads=3), (48, 80)),
    "aimv2_large_patch14_224": (dict(embed_dim=48, depth=4, num_heads=3), (42, 70)),
    "eva02_tiny_patch14_224": (dict(embed_dim=48, depth=4, num_heads=3), (42, 70)),
    "vit_base_patch16_sapiens2": (
        dict(embed_dim=64, depth=4, num_heads=4, num_kv_heads=(4, 2, 2, 4)),
        (48, 80),
    ),
    "vit_base_patch16_radio_v3": (dict(embed_dim=48, depth=4, num_heads=3), (48, 80)),
    "convnext_atto": (dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)), (64, 96)),
    "swin_tiny_patch4_window7_224": (
        dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)),
        (64, 96),
    ),
}
GIANTS = {  # model -> billions of parameters, by timm's own count without a classifier
    "vit_7b_patch16_dinov3": 6.716,
    "vit_huge_plus_patch16_dinov3": 0.841,
    "vit_giant_patch14_reg4_dinov2": 1.136,
    "vit_pe_spatial_gigantic_patch14_448": 1.852,
    "aimv2_3b_patch14_448": 2.723,
    "vit_5b_patch16_sapiens2": 5.067,
    "vit_giantopt_patch16_siglip_384": 1.164,
    "eva02_enormous_patch14_clip_224": 4.349,
    "vit_giant_patch16_radio_v3": 1.136,
    "convnext_xxlarge": 0.843,
    "swin_large_patch4_window12_384": 0.195,
}


def backbone(name: str, **arguments) -> nn.Module:
    return build_backbone(ConfigDict(type="TimmBackbone", model_name=name, **arguments))


def tiny(name: str, **arguments) -> nn.Module:
    """A small member of a family, with timm's initial values."""
    model = backbone(name, model_args=MEMBERS[name][0], **arguments)
    initialise(nn.ModuleDict({"backbone": model}), 0, torch.float32)
    return model


def shaken(model: nn.Module) -> nn.Module:
    """With other parameters: layer scales that begin near 0 hide what is inside a block."""
    torch.manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("name", MEMBERS)
def test_features_are_timms_own_at_any_size(name):
    model = shaken(tiny(name)).eval()
    settings, (height, width) = MEMBERS[name]
    image = torch.randn(2, 3, height, width)
    any_size = dict(dynamic_img_size=True) if model.follows_dtype else dict(strict_img_size=False)
    theirs = timm.create_model(name, **settings, **({} if "convnext" in name else any_size)).eval()
    missing, unexpected = theirs.load_state_dict(model.model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {
        *("head.weight", "head.bias", "head.fc.weight", "head.fc.bias"),
        *model.pretrained_extras,
    }
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            image, indices=list(model.out_indices), intermediates_only=True, output_fmt="NCHW"
        )
        found = model(image)
    assert [features.shape for features in found] == [features.shape for features in expected]
    assert all(torch.allclose(ours, its, atol=1e-5) for ours, its in zip(found, expected))
    assert float(found[-1].std()) > 0.1
    assert model.channels == tuple(features.shape[1] for features in found)


@pytest.mark.parametrize("name", GIANTS)
def test_giants_are_built_and_run_on_the_meta_device(name):
    with torch.device("meta"):
        model = backbone(name).train()
        maps = model(torch.empty(1, 3, 448 if "patch14" in name else 384, 384 if "16" in name else 448))
    removed = sum(param.numel() for param in timm_parameters(name)) - sum(
        param.numel() for param in model.parameters()
    )
    assert len(maps) == 4 and all(features.dim() == 4 for features in maps)
    assert removed >= 0 and round(sum(p.numel() for p in timm_parameters(name)) / 1e9, 3) == GIANTS[name]
    block = repeated_block(model)
    assert block is not None and sum(block.sizes) * len(model._blocks) > 0.5 * sum(
        param.numel() for param in model.parameters()
    )


def timm_parameters(name: str) -> list[nn.Parameter]:
    with torch.device("meta"):
        return list(timm.create_model(name, num_classes=0).parameters())


def test_layers_are_timms_groups():
    model = tiny("vit_small_patch16_dinov3", final_norm=True)
    assert model.depth == 4
    assert model.layer_id("model.cls_token") == model.layer_id("model.patch_embed.proj.weight") == 0
    assert [model.layer_id(f"model.blocks.{n}.attn.qkv.weight") for n in range(4)] == [1, 2, 3, 4]
    assert model.layer_id("model.norm.weight") == 4  # timm counts the last norm with the last block
    assert {"cls_token", "reg_token"} <= set(model.no_decay_words)
    levels = tiny("convnext_atto")
    assert levels.depth == 5 and levels.layer_id("model.stages.1.downsample.1.weight") == 2


def test_what_no_loss_reaches_is_left_out():
    model = tiny("vit_small_patch16_dinov3", out_indices=(0, 2))
    assert len(model.model.blocks) == 3 and "norm.weight" in model.pretrained_extras
    assert any(name.startswith("blocks.3.") for name in model.pretrained_extras)
    model(torch.randn(1, 3, 48, 48))[1].square().sum().backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == []


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_every_checkpointing_policy_gives_the_same_gradients(name):
    image = torch.randn(2, 3, *MEMBERS[name][1])
    gradients = {}
    for policy in ("none", "blocks", 2, "all_but_matmuls"):
        model = tiny(name, drop_path_rate=0.2, with_cp=policy != "none").train()
        model.recomputation = policy
        torch.manual_seed(1)
        sum(features.square().mean() for features in model(image)).backward()
        gradients[policy] = {key: param.grad for key, param in model.named_parameters()}
    for policy, found in gradients.items():
        assert all(torch.equal(found[key], value) for key, value in gradients["none"].items()), policy


def kept_elements(model: nn.Module, image: torch.Tensor) -> int:
    """What a forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        model(image)
    return sum(sizes)


def test_checkpointing_keeps_less():
    kept = {}
    for with_cp in (False, True):
        model = tiny("vit_small_patch16_dinov3", with_cp=with_cp).train()
        kept[with_cp] = kept_elements(model, torch.randn(1, 3, 96, 96))
    assert kept[True] < 0.3 * kept[False]


def test_initial_values_are_of_timms_distributions_and_follow_the_seed():
    first, again = tiny("vit_small_patch16_dinov3"), tiny("vit_small_patch16_dinov3")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    model = first.model
    assert float(model.blocks[0].attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.1)
    # timm scales the last layers of block n down by sqrt(2 n)
    assert float(model.blocks[3].mlp.fc2.weight.std()) == pytest.approx(0.02 / 8**0.5, rel=0.1)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert float(model.blocks[0].mlp.fc1.bias.abs().max()) == 0


def test_a_bf16_model_gives_the_features_to_bf16_rounding():
    exact = shaken(tiny("vit_small_patch16_dinov3")).eval()
    image = torch.randn(1, 3, 320, 320)
    rounded = tiny("vit_small_patch16_dinov3").eval()
    rounded.load_state_dict(exact.state_dict())
    for param in rounded.parameters():
        param.data = param.data.bfloat16()
    with torch.no_grad():
        expected, found = exact(image)[-1], rounded(image.bfloat16())[-1]
    assert found.dtype == torch.bfloat16
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            dict(name="vit_smal_patch16_dinov3"),
            "did you mean 'vit_small_patch16_dinov3",
        ),
        (dict(name="vit_small_patch16_dinov3", out_indices=(3, 12)), r"out_indices=\[3, 12\] .* 0 to 11"),
        (dict(name="vit_small_patch16_dinov3", out_indices=(3, 2)), r"out_indices=\[3, 2\] .* ascending"),
        (dict(name="eva02_tiny_patch14_224", final_norm=True), "no last norm"),
    ],
)
def test_what_timm_does_not_have_is_said(arguments, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        backbone(**arguments)


def test_frozen_it_neither_trains_nor_drops():
    model = tiny("vit_small_patch16_dinov3", freeze=True, drop_path_rate=0.9).train()
    image = torch.randn(1, 3, 48, 48)
    assert not any(param.requires_grad for param in model.parameters())
    assert torch.equal(model(image)[0], model(image)[0]) and not model(image)[0].requires_grad


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("vit_tiny_patch16_224", dict(drop_path_rate=2.0), "drop-path rate of 2"),
        ("vgg11", dict(drop_path_rate=0.1), "timm's vgg11 has none"),
        ("vit_small_r26_s32_224", dict(out_indices=[99]), "ascending numbers"),
        (
            "vit_tiny_patch16_224",
            dict(model_args=dict(num_heads=5)),
            r"model_args=\{'num_heads': 5\}.*divisible",
        ),
        ("vit_tiny_patch16_224", dict(model_args=dict(num_head=3)), "did you mean 'num_heads'"),
        ("vit_tiny_patch16_224", dict(model_args=dict(depth="a")), "cannot be built with model_args"),
        ("vit_tiny_patch16_224", dict(model_args=dict(num_classes=7)), "before the classifier"),
        ("vit_tiny_patch16_224", dict(model_args=dict(pretrained=True)), "nothing is downloaded"),
        ("convnext_atto", dict(img_size=64), "convnext_atto has none"),
    ],
)
def test_a_setting_that_a_model_cannot_have_is_an_error(name, arguments, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        backbone(name, **arguments)


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "repvit_m1", "caformer_s18"])
def test_models_without_drop_path_or_groups_of_layers_give_maps(name):
    with torch.device("meta"):
        model = backbone(name)
        maps = model(torch.empty(2, 3, 64, 96))
    assert [features.size(1) for features in maps] == list(model.channels)
    if name == "caformer_s18":
        with pytest.raises(ValueError, match="one learning rate for all"):
            model.layer_id("model.stem.conv.weight")


def test_a_size_that_a_model_cannot_take_is_named_before_a_run():
    with torch.device("meta"):
        model = backbone("efficientformer_l1", img_size=None)
        with pytest.raises(ValueError, match=r"64 x 96 .* 224 x 224"):
            model(torch.empty(1, 3, 64, 96))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("hiera_tiny_224", (96, 192, 384, 768)),
        ("sam2_hiera_tiny", (96, 192, 384, 768)),
        ("crossvit_tiny_240", (96, 96, 192, 192)),
        ("xcit_tiny_12_p8_224", (192,) * 4),
    ],
)
def test_transformers_that_are_not_plain_give_their_maps(name, channels):
    with torch.device("meta"):
        model = backbone(name)
        size = model.model.pretrained_cfg["input_size"][1:]
        maps = model(torch.empty(2, 3, *size))
    assert model.channels == tuple(features.size(1) for features in maps)
    assert sorted(set(model.channels)) == sorted(set(channels)) and model.depth > 2


def test_heads_that_do_not_divide_the_width_are_not_blamed_on_the_size_of_images():
    with torch.device("meta"):
        model = backbone("vit_small_patch16_dinov3", model_args=dict(num_heads=5))
        with pytest.raises(ValueError, match=r"no feature maps .*model_args=\{'num_heads': 5\}"):
            model(torch.empty(1, 3, 64, 96))


@pytest.mark.slow
def test_every_family_of_timm_gives_maps_or_one_error_of_ours():
    smallest: dict[str, str] = {}
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        smallest[module] = min(smallest.get(module, name), name, key=lambda each: (len(each), each))
    for name in smallest.values():
        with torch.device("meta"):
            try:
                model = backbone(name).eval()
                maps = model(
                    torch.empty(1, 3, *model.model.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
                )
            except ValueError as error:
                assert f"timm's {name}" in str(error)
            except NotImplementedError as error:  # which the checks before a run take for "not checked"
                assert "reads values" in str(error)
            else:
                assert model.channels == tuple(features.size(1) for features in maps), name


def test_the_patch_of_a_hybrid_is_what_its_tokens_stand_for():
    with torch.device("meta"):
        assert backbone("vit_small_r26_s32_224").patch_size == (32, 32)


def test_a_file_of_timm_holds_the_running_statistics():
    model = backbone("resnet18", out_indices=(0, 1, 2, 3, 4))
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    names, _ = model.exported("timm")
    state = model.state_dict()
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict({name: state[ours] for ours, (name,) in names.items()}, strict=True)
    image = torch.randn(2, 3, 64, 64)
    expected = theirs.eval().forward_intermediates(image, intermediates_only=True)
    for ours, its in zip(model.eval()(image), expected, strict=True):
        torch.testing.assert_close(ours, its)


@pytest.mark.parametrize("policy", ["blocks", "all_but_matmuls"])
def test_blocks_that_run_twice_count_a_batch_once(policy):
    image, models = torch.randn(2, 3, 64, 64), {}
    for recomputation in ("none", policy):
        torch.manual_seed(0)
        model = models[recomputation] = backbone("resnet18", with_cp=recomputation != "none").train()
        allow_any_device(model)
        model.recomputation = recomputation
        sum(features.square().mean() for features in model(image)).backward()
    torch.testing.assert_close(models[policy].state_dict(), models["none"].state_dict(), rtol=0, atol=0)
    assert models[policy].model.bn1.num_batches_tracked == 1


def test_a_model_without_repeated_blocks_has_no_activation_checkpointing():
    with pytest.raises(ValueError, match="no activation checkpointing"):
        set_recomputation(backbone("regnetx_002", out_indices=(0, 1)), "blocks")


@pytest.mark.parametrize(("name", "value"), [("img_size", 64), ("drop_path_rate", 0.2)])
def test_an_argument_that_is_given_twice_is_refused(name, value):
    other = {name: 2 * value}
    with pytest.raises(ValueError, match=f"{name}={value}.*model_args.*{2 * value}"):
        backbone("vit_small_patch16_dinov3", model_args=other, **{name: value})
