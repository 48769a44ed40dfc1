import pytest
import torch
from mmcv import Config, ConfigDict
from mmseg.models import build_segmentor
from torch import nn

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.distributed.construction import build_on_meta, choose_trained
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.parameter_groups import groups_in, parameter_groups, unmatched_custom_keys
from tests.conftest import ROOT, TINY

ADAMW = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build_on_meta(Config.fromfile(ROOT / TINY).model)


def settings(model: nn.Module, **optimizer) -> dict[str, tuple[float, float]]:
    """lr and weight decay of each parameter by name."""
    names = {id(param): name for name, param in model.named_parameters()}
    groups = parameter_groups(model, ADAMW | optimizer)
    return {
        names[id(param)]: (group["lr"], group["weight_decay"])
        for group in groups
        for param in group["params"]
    }


LAYER_DECAY = {
    "constructor": "CustomLayerDecayOptimizerConstructor",
    "paramwise_cfg": {"num_layers": 4, "layer_decay_rate": 0.5},
}


# worked out by hand from the published rule: 0.5 ** (5 - layer)
@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("backbone.cls_token", 0.5**5, 0.05),
        ("backbone.pos_embed", 0.5**5, 0.05),
        ("backbone.patch_embed.proj.weight", 0.5**5, 0.05),
        ("backbone.patch_embed.proj.bias", 0.5**5, 0.0),
        ("backbone.blocks.0.attn.qkv.weight", 0.5**4, 0.05),
        ("backbone.blocks.0.norm1.weight", 0.5**4, 0.0),
        ("backbone.blocks.3.ls2.gamma", 0.5, 0.0),
        ("backbone.blocks.3.mlp.fc2.bias", 0.5, 0.0),
        ("backbone.up1.0.weight", 1.0, 0.05),
        ("decode_head.conv_seg.weight", 1.0, 0.05),
        ("auxiliary_head.convs.0.bn.weight", 1.0, 0.0),
    ],
)
def test_layer_decay_gives_each_layer_its_published_rate(model, name, lr, weight_decay):
    assert settings(model, **LAYER_DECAY)[name] == pytest.approx((lr, weight_decay))


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, {**ADAMW, **LAYER_DECAY})
    grouped = [id(param) for group in groups for param in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert len(groups) == 2 * 6  # layers 0 to 5, with and without decay


def test_mmcvs_own_paramwise_rules_work_and_share_groups(model):
    found = settings(
        model, paramwise_cfg={"norm_decay_mult": 0.0, "custom_keys": {"decode_head": {"lr_mult": 10.0}}}
    )
    assert found["decode_head.conv_seg.weight"] == (10.0, 0.05)
    assert found["backbone.blocks.0.attn.qkv.weight"] == (1.0, 0.05)
    assert found["decode_head.psp_modules.0.1.bn.weight"][0] == 10.0
    assert len(parameter_groups(model, ADAMW)) == 1


def test_frozen_parameters_are_in_no_group():
    cfg = Config.fromfile(ROOT / TINY).model
    cfg.backbone.freeze_vit = True
    model = build_on_meta(cfg)
    found = settings(model, **LAYER_DECAY)
    assert "backbone.blocks.0.attn.qkv.weight" not in found and "backbone.up2.0.weight" in found


def test_a_model_with_nothing_to_train_is_an_error(model):
    with pytest.raises(ConfigError, match="everything is frozen"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), ADAMW)


def test_layer_decay_without_layer_ids_says_which_backbone():
    segmentor = nn.Module()
    segmentor.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear has no layer_id"):
        parameter_groups(segmentor, {**ADAMW, **LAYER_DECAY})


def test_shapes_are_those_before_partitioning():
    segmentor = nn.Module()
    segmentor.backbone = nn.Linear(3, 3)
    segmentor.backbone.depth, segmentor.backbone.layer_id = 4, lambda name: 5
    for param, shape in ((segmentor.backbone.weight, (3, 3)), (segmentor.backbone.bias, (3,))):
        param.ds_shape = torch.Size(shape)
        param.data = torch.empty(0)  # what ZeRO-3 leaves
    assert settings(segmentor, **LAYER_DECAY) == {"backbone.weight": (1.0, 0.05), "backbone.bias": (1.0, 0.0)}


def test_a_learning_rate_that_is_not_written_down_is_asked_for(model):
    with pytest.raises(ConfigError, match="optimizer has no lr"):
        parameter_groups(model, dict(type="AdamW", weight_decay=0.05))


@pytest.mark.parametrize(
    ("kind", "default"),
    [("AdamW", 0.01), ("Adam", 0.0), ("SGD", 0.0), ("torch.optim.AdamW", 0.01), ("timm.optim.NAdamW", 0.01)],
)
def test_a_weight_decay_that_is_not_written_down_is_the_optimizers_own(kind, default, model):
    assert {group["weight_decay"] for group in parameter_groups(model, dict(type=kind, lr=1.0))} == {default}
    optimizer = dict(type=kind, lr=1.0, paramwise_cfg=dict(norm_decay_mult=0.0))
    assert {group["weight_decay"] for group in parameter_groups(model, optimizer)} == {default, 0.0}


def test_a_constructor_may_not_give_groups_other_settings_than_rate_and_decay(model):
    from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor

    @OPTIMIZER_BUILDERS.register_module(force=True)
    class SlowMoments(DefaultOptimizerConstructor):
        def add_params(self, params, module, **_):
            params += [
                {
                    "params": list(module.backbone.parameters()),
                    "betas": self.paramwise_cfg["betas"],
                    "of_its_own": 1,
                },
                {"params": list(module.decode_head.parameters())},
            ]

    parameter_groups(
        model,
        ADAMW | dict(constructor="SlowMoments", betas=(0.9, 0.95), paramwise_cfg=dict(betas=(0.9, 0.95))),
    )
    with pytest.raises(
        ConfigError,
        match=r"'SlowMoments'.*betas=\(0\.9, 0\.95\).*\(0\.9, 0\.999\)",
    ):
        parameter_groups(
            model, ADAMW | dict(constructor="SlowMoments", paramwise_cfg=dict(betas=(0.9, 0.95)))
        )


BACKBONES = {
    "BEiT": (
        dict(
            img_size=32,
            patch_size=16,
            embed_dims=8,
            num_layers=3,
            num_heads=2,
            init_values=0.1,
            out_indices=[2],
        ),
        dict(
            constructor="LayerDecayOptimizerConstructor",
            paramwise_cfg=dict(num_layers=3, layer_decay_rate=0.9),
        ),
    ),
    "MAE": (
        dict(
            img_size=32,
            patch_size=16,
            embed_dims=8,
            num_layers=3,
            num_heads=2,
            init_values=0.1,
            out_indices=[2],
        ),
        dict(
            constructor="LearningRateDecayOptimizerConstructor",
            paramwise_cfg=dict(num_layers=3, decay_rate=0.65, decay_type="layer_wise"),
        ),
    ),
    "ConvNeXt": (
        dict(
            arch=dict(depths=[1, 1, 3, 1], channels=[4, 4, 8, 8]),
            out_indices=[3],
            gap_before_final_norm=False,
        ),
        dict(
            constructor="LearningRateDecayOptimizerConstructor",
            paramwise_cfg=dict(num_layers=6, decay_rate=0.9, decay_type="stage_wise"),
        ),
    ),
}


def segmentor(kind: str) -> ConfigDict:
    head = dict(type="FCNHead", in_channels=8, channels=4, num_classes=3)
    return ConfigDict(
        type="EncoderDecoder",
        train_cfg={},
        test_cfg=dict(mode="whole"),
        decode_head=head,
        backbone=dict(type=f"mmcls.{kind}" if kind == "ConvNeXt" else kind, **BACKBONES[kind][0]),
    )


@pytest.mark.parametrize("kind", BACKBONES)
def test_mmsegs_own_constructors_give_their_own_groups(kind):
    import mmcls.models  # noqa: F401 - registers ConvNeXt
    from mmseg.core import build_optimizer

    model, optimizer = build_segmentor(segmentor(kind)), ADAMW | BACKBONES[kind][1]
    names = {id(param): name for name, param in model.named_parameters()}
    theirs = {
        names[id(param)]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(model, dict(optimizer)).param_groups
        for param in group["params"]
    }
    assert (
        settings(build_on_meta(segmentor(kind)), **BACKBONES[kind][1]) == theirs
        and len(set(theirs.values())) > 3
    )


def test_groups_of_a_meta_model_are_given_the_parameters_of_another_whose_shapes_are_hidden():
    meta, built = build_on_meta(segmentor("BEiT")), build_segmentor(segmentor("BEiT"))
    for param in built.parameters():
        param.data = torch.empty(0)  # what ZeRO-3 leaves
    groups = parameter_groups(meta, ADAMW | BACKBONES["BEiT"][1])
    names = {id(param): name for name, param in built.named_parameters()}
    moved = groups_in(built, groups, meta)
    assert [group["name"] for group in moved] == [group["name"] for group in groups]
    found = {
        names[id(param)]: (group["lr"], group["weight_decay"]) for group in moved for param in group["params"]
    }
    assert found == settings(meta, **BACKBONES["BEiT"][1])


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (
            dict(
                constructor="LearningRateDecayOptimizerConstructor",
                paramwise_cfg=dict(num_layers=4, decay_rate=0.9),
            ),
            "backbone InternViT6B.*NotImplementedError",
        ),
        (
            dict(constructor="LearningRateDecayOptimizerConstructor", paramwise_cfg=dict(decay_rate=0.9)),
            "TypeError",
        ),
        (dict(constructor="NoConstructor"), "NoConstructor is not registered"),
        (dict(paramwise_cfg=dict(norm_decay_mul=0.0)), "did you mean 'norm_decay_mult'"),
        (
            dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mul=0.1)))),
            r"'lr_mul' in .*custom_keys\['backbone'\]; did you mean 'lr_mult'",
        ),
    ],
)
def test_a_constructor_that_cannot_work_is_one_sentence(model, optimizer, words):
    with pytest.raises(ConfigError, match=words):
        parameter_groups(model, ADAMW | optimizer)


def test_custom_keys_that_no_name_holds_are_named(model):
    keys = {"cls_token": dict(decay_mult=0.0), "absolute_pos_embed": dict(decay_mult=0.0)}
    (said,) = unmatched_custom_keys(model, ADAMW | {"paramwise_cfg": {"custom_keys": keys}})
    assert "paramwise_cfg.custom_keys" in said and said.endswith(" absolute_pos_embed")
    assert unmatched_custom_keys(model, ADAMW) == []


def test_adapters_have_the_learning_rate_of_their_block_and_weight_decay():
    model = build_on_meta(Config.fromfile(ROOT / TINY).model)
    plain = settings(model, **LAYER_DECAY)
    choose_trained(model, EngineOptions(tune={"lora": {"rank": 2}}))
    found = {name: rates for name, rates in settings(model, **LAYER_DECAY).items() if ".lora_" in name}
    assert len(found) == 4 * 4 * 2
    assert {rates[0] for rates in found.values()} == {0.5**4, 0.5**3, 0.5**2, 0.5}
    for name, rates in found.items():
        assert rates == plain[name.split(".lora_")[0] + ".weight"]


@pytest.mark.parametrize(
    ("paramwise_cfg", "words"),
    [
        (dict(custom_keys=[1, 2]), r"custom_keys=\[1, 2\] must be a dict"),
        (dict(custom_keys=dict(head=0)), r"custom_keys\['head'\]=0 must be a dict"),
        (
            dict(custom_keys=dict(head=dict(lr_mult=-1))),
            r"custom_keys\['head'\]\.lr_mult=-1 must be a number",
        ),
        (dict(bias_lr_mult=float("nan")), "paramwise_cfg.bias_lr_mult=nan must be a number of at least 0"),
        (dict(norm_decay_mult="x"), "paramwise_cfg.norm_decay_mult='x' must be a number of at least 0"),
    ],
    ids=str,
)
def test_factors_that_are_no_numbers_are_an_error(paramwise_cfg, words, model):
    with pytest.raises(ConfigError, match=words):
        parameter_groups(model, ADAMW | {"paramwise_cfg": paramwise_cfg})
