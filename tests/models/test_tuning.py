"""Which parameters of a backbone train, and which layers get adapters."""

import pytest
import torch
from mmcv import ConfigDict
from mmseg.models import build_backbone
from torch import nn

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.distributed.construction import build_on_meta, choose_trained
from internseg_ds.errors import ConfigError
from internseg_ds.lora_names import plain_name
from internseg_ds.models.lora import Lora, adapters
from internseg_ds.models.tuning import LastBlocks, tune
from internseg_ds.preflight.tuning_checks import calls_of, check_tuned_parts
from tests.distributed.test_block_hooks import RESNET, VIT, model_of

INTERN_VIT = dict(
    type="InternViT6B",
    patch_size=14,
    img_size=28,
    embed_dim=16,
    depth=4,
    num_heads=2,
    use_flash_attn=False,
    with_fpn=True,
    drop_path_rate=0.5,
    out_indices=[0, 1, 2, 3],
)
SWIN = dict(type="SwinTransformer", embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4)
BEIT = dict(
    type="BEiT",
    img_size=(32, 32),
    patch_size=8,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
    out_indices=(2,),
    qv_bias=True,
)
INTERN_IMAGE = dict(
    type="InternImage", channels=8, depths=[1, 1, 2, 1], groups=[1, 2, 4, 8], with_cp=False, norm_layer="BN"
)
TIMM = dict(
    type="TimmBackbone",
    model_name="vit_small_patch16_dinov3",
    img_size=32,
    model_args=dict(embed_dim=32, depth=3, num_heads=2),
    out_indices=(0, 1, 2),
    final_norm=True,
)
SIDE = {"SwinTransformer": 64, "InternImage": 64, "InternViT6B": 28}


def segmentor(backbone: dict, mode: object) -> nn.Module:
    """The backbone with its initial values, as part of a segmentor."""
    whole = nn.Module()
    whole.backbone = build_backbone(dict(backbone))
    tune(whole, mode)
    return whole.train()


def trained(backbone: dict, tune: object) -> set[str]:
    model = build_on_meta(ConfigDict(model_of("vit"), backbone=backbone))
    choose_trained(model, EngineOptions(tune=tune))
    return {name for name, param in model.backbone.named_parameters() if param.requires_grad}


def image_for(backbone: dict, device: str = "cpu") -> torch.Tensor:
    side = SIDE.get(backbone["type"], 32)
    return torch.randn(2, 3, side, side, device=device)


@pytest.mark.parametrize(
    ("backbone", "blocks", "behind"),
    [
        (INTERN_VIT, ("blocks.2.", "blocks.3."), ("up1.", "up2.")),
        (INTERN_IMAGE, ("levels.2.blocks.1.", "levels.3."), ("levels.2.norm", "levels.2.downsample")),
        (TIMM, ("model.blocks.1.", "model.blocks.2."), ("model.norm.",)),
        (VIT, ("layers.1.", "layers.2."), ()),
        (SWIN, ("stages.2.blocks.1.", "stages.3."), ("stages.2.downsample", "norm")),
    ],
)
def test_the_last_blocks_train_with_what_follows_them_and_head_leaves_the_neck(backbone, blocks, behind):
    names = {
        name
        for name, _ in build_on_meta(
            ConfigDict(model_of("vit"), backbone=backbone)
        ).backbone.named_parameters()
    }
    found = trained(backbone, dict(last_blocks=2))
    assert found == {name for name in names if name.startswith(blocks + behind)}
    assert all(any(name.startswith(part) for name in found) for part in blocks + behind)
    assert trained(backbone, "head") == {name for name in names if name.startswith("up")}


@pytest.mark.parametrize("mode", ["head", LastBlocks(2)])
@pytest.mark.parametrize("backbone", [INTERN_VIT, INTERN_IMAGE, TIMM, SWIN], ids=lambda it: it["type"])
def test_frozen_blocks_keep_no_graph_and_run_as_in_an_evaluation(backbone, mode):
    model = segmentor(backbone, mode)
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    asks: dict[nn.Module, bool] = {}
    for module in model.backbone.modules():
        module.register_forward_hook(
            lambda module, _, out: asks.update({module: isinstance(out, torch.Tensor) and out.requires_grad})
        )
    maps = model.backbone(image_for(backbone))
    untrained = [
        (name, module)
        for name, module in model.backbone.named_modules()
        if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
    ]
    assert untrained and not any(module.training for _, module in untrained)
    first = next((name for name, module in model.backbone.named_modules() if asks.get(module)), None)
    assert (first is None) == (mode == "head" and not any(features.requires_grad for features in maps))
    order = [name for name, _ in model.backbone.named_modules()]
    in_front = [
        module for name, module in untrained if first is None or order.index(name) < order.index(first)
    ]
    assert in_front and not any(asks.get(module, False) for module in in_front)
    frozen = {name for name, _ in untrained}
    for name, value in model.backbone.named_buffers():  # statistics of batch norms
        assert torch.equal(value, before[name]) or name.rpartition(".")[0] not in frozen, name


@pytest.mark.parametrize(
    ("backbone", "endings"),
    [
        (INTERN_VIT, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        (
            INTERN_IMAGE,
            {"dcn.offset", "dcn.mask", "dcn.input_proj", "dcn.output_proj", "mlp.fc1", "mlp.fc2"},
        ),
        (TIMM, {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}),
        # torch's attention reads the weights of its projection itself, and BEiT's those of qkv
        (VIT, {"ffn.layers.0.0", "ffn.layers.1"}),
        (BEIT, {"attn.proj", "ffn.layers.0.0", "ffn.layers.1"}),
        (SWIN, {"attn.w_msa.qkv", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1"}),
    ],
    ids=lambda it: it["type"] if isinstance(it, dict) else "",
)
def test_by_default_every_linear_layer_that_a_block_calls_has_an_adapter_that_learns(backbone, endings):
    model = segmentor(backbone, Lora(2, alpha=4.0))
    found = adapters(model.backbone)
    assert {name for name in found if not name.endswith(tuple(endings))} == set()
    assert {ending for ending in endings if any(name.endswith(ending) for name in found)} == endings
    plain = dict(build_backbone(dict(backbone)).named_parameters())
    names = {plain_name(name) for name, _ in model.backbone.named_parameters()}
    assert names == set(plain)
    for layer in found.values():
        nn.init.normal_(layer.lora_B["default"].weight)  # zeros would let nothing through to A
    torch.manual_seed(0)
    maps = model.backbone(image_for(backbone))
    sum(features.square().mean() for features in maps).backward()
    params = dict(model.backbone.named_parameters())
    own = [name for name in params if not name.startswith("up")]
    learning = {name for name in own if params[name].grad is not None and params[name].grad.any()}
    assert learning == {name for name in own if ".lora_" in name}


@pytest.mark.parametrize(
    ("backbone", "tune", "words"),
    [
        (INTERN_VIT, dict(last_blocks=5), "last_blocks=5 is more than the 4 blocks of InternViT6B"),
        (
            INTERN_VIT,
            dict(lora=dict(rank=2, targets=["qkv", "query"])),
            "'query' is the end of no linear layer's name; the blocks of InternViT6B have attn.proj, attn.qkv, "
            "mlp.fc1, mlp.fc2",
        ),
        (RESNET, dict(lora=dict(rank=2)), r"the blocks of ResNet \(BasicBlock\) call no linear layers"),
        (dict(type="CGNet", num_blocks=(1, 1)), dict(last_blocks=1), "CGNet repeats no block"),
        (dict(type="CGNet", num_blocks=(1, 1)), dict(lora=dict(rank=1)), "CGNet repeats no block"),
        (dict(TIMM, freeze=True), dict(lora=dict(rank=2)), "contradicts a setting .* that freezes it"),
        (dict(INTERN_VIT, freeze_vit=True), dict(last_blocks=1), "contradicts a setting"),
        (dict(INTERN_IMAGE, frozen_stages=4), dict(last_blocks=1), "contradicts a setting"),
    ],
)
def test_what_a_backbone_does_not_have_is_refused(backbone, tune, words):
    with pytest.raises(ConfigError, match=words):
        trained(backbone, tune)


def test_a_backbone_that_is_frozen_already_may_be_called_so():
    assert not trained(dict(TIMM, freeze=True), "head")


@pytest.mark.parametrize(
    ("backbone", "tune", "words"),
    [
        (BEIT, dict(lora=dict(rank=2, targets=["qkv", "proj"])), "layers.0.attn.qkv.* would have no effect"),
        (VIT, dict(lora=dict(rank=2, targets=["out_proj"])), "attn.attn.out_proj.* would have no effect"),
        (
            dict(INTERN_VIT, with_fpn=False, out_indices=[0, 1]),
            dict(last_blocks=2),
            "would train blocks.2, blocks.3, on which no feature map depends",
        ),
        (BEIT, dict(lora=dict(rank=2, targets=["proj"])), None),
        (INTERN_VIT, dict(last_blocks=2), None),
    ],
)
def test_adapters_that_are_passed_by_and_blocks_that_are_not_run_are_refused(backbone, tune, words):
    options = EngineOptions(tune=tune)
    model = build_on_meta(ConfigDict(model_of("vit"), backbone=backbone))
    choose_trained(model, options)
    with calls_of(model) as called:
        model.eval().backbone(image_for(backbone, "meta"))
    if words is None:
        check_tuned_parts(model, options.tune, called)
    else:
        with pytest.raises(ConfigError, match=words):
            check_tuned_parts(model, options.tune, called)


def test_a_freeze_of_all_that_would_train_is_refused():
    model = build_on_meta(ConfigDict(model_of("vit"), backbone=VIT))
    with pytest.raises(ConfigError, match=r"engine.freeze=\['backbone'\] freezes it all"):
        choose_trained(model, EngineOptions(tune=dict(lora=dict(rank=1)), freeze=["backbone"]))


@pytest.mark.parametrize(
    ("name", "stay"),
    [
        ("backbone.model.blocks.0.attn.proj.weight", ["lora_A.default.weight", "lora_B.default.weight"]),
        ("backbone.model.blocks.0.attn.proj.bias", []),
        ("backbone.model.blocks.0.attn.proj", ["lora_A.default.weight", "lora_B.default.weight"]),
    ],
)
def test_what_is_frozen_beside_adapters_has_its_name_without_them(name, stay):
    model = build_on_meta(ConfigDict(model_of("vit"), backbone=TIMM))
    with_all = build_on_meta(ConfigDict(model_of("vit"), backbone=TIMM))
    lora = dict(lora=dict(rank=2))
    choose_trained(model, EngineOptions(tune=lora, freeze=(name,)))
    choose_trained(with_all, EngineOptions(tune=lora))
    before, after = (
        {key for key, param in each.named_parameters() if param.requires_grad} for each in (with_all, model)
    )
    assert before - after == {f"backbone.model.blocks.0.attn.proj.{end}" for end in stay}


def test_a_rank_that_no_matrix_can_have_is_refused():
    with pytest.raises(ConfigError, match=r"rank=100000 is more than .* 32 at most"):
        trained(TIMM, dict(lora=dict(rank=100000)))
    assert trained(TIMM, dict(lora=dict(rank=32)))
