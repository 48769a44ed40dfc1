"""Learning rate and weight decay of every parameter of InternImage's experiments, against a table made from
the published rules, and what is refused."""

import re

import pytest
from mmcv import Config, ConfigDict
from torch import nn

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.parameter_groups import parameter_groups
from tests.conftest import IMAGE, ROOT, TINY

SIZES = {
    "T": dict(channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16, 32], layer_scale=1.0),
    "H": dict(
        channels=320,
        depths=[6, 6, 32, 6],
        groups=[10, 20, 40, 80],
        dw_kernel_size=5,
        res_post_norm=True,
        level2_post_norm=True,
        level2_post_norm_block_ids=[5, 11, 17, 23, 29],
        center_feature_scale=True,
    ),
}
OPTIMIZERS = {
    "T": dict(lr=6e-5, paramwise_cfg=dict(num_layers=30, layer_decay_rate=1.0, depths=[4, 4, 18, 4])),
    "H": dict(
        lr=2e-5,
        paramwise_cfg=dict(num_layers=50, layer_decay_rate=0.95, depths=[6, 6, 32, 6], offset_lr_scale=1.0),
    ),
}
LAYER_DECAY = dict(type="AdamW", weight_decay=0.05, constructor="CustomLayerDecayOptimizerConstructor")


def segmentor(size: str) -> nn.Module:
    head = dict(num_classes=150, norm_cfg=dict(type="SyncBN"), channels=64)
    channels = [SIZES[size]["channels"] * 2**level for level in range(4)]
    return build_on_meta(
        ConfigDict(
            type="EncoderDecoder",
            backbone=dict(type="InternImage", **SIZES[size]),
            train_cfg={},
            test_cfg=dict(mode="whole"),
            decode_head=dict(type="UPerHead", in_channels=channels, in_index=[0, 1, 2, 3], **head),
            auxiliary_head=dict(
                type="FCNHead", in_channels=channels[2], in_index=2, num_convs=1, concat_input=False, **head
            ),
        )
    )


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {size: segmentor(size) for size in SIZES}


def settings(model: nn.Module, **optimizer: object) -> dict[str, tuple[float, float]]:
    names = {id(param): name for name, param in model.named_parameters()}
    return {
        names[id(param)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, LAYER_DECAY | optimizer)
        for param in group["params"]
    }


def published(
    name: str,
    dims: int,
    depths: list[int],
    lr: float,
    decay: float,
    *,
    small: bool = False,
    offsets: float = 1.0,
) -> tuple[float, float]:
    """The rules of mmcv_custom/custom_layer_decay_optimizer_constructor.py, read as a table: lr and weight
    decay of one parameter."""
    starts = [1, 1 + depths[0], 1 + depths[0] + depths[1], 1 + depths[0] + depths[1] + depths[2]]
    last = sum(depths) + 1
    if name.startswith("backbone.patch_embed."):
        layer = 0
    elif found := re.match(r"backbone\.levels\.(\d)\.(?:downsample|norm)\.", name):
        layer = starts[min(int(found[1]) + 1, 3)]
    elif found := re.match(r"backbone\.levels\.(\d)\.(?:blocks|post_norms)\.(\d+)\.", name):
        layer = starts[int(found[1])] + int(found[2])
    else:
        layer = last
    scale = decay ** (last - layer)
    if small and scale < 1:
        scale *= 0.1
    if re.search(r"\.dcn\.offset\.", name):
        scale *= offsets
    return lr * scale, 0.0 if dims == 1 or name.endswith(".bias") or "norm" in name else 0.05


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_the_published_experiments_has_its_published_rates(size, models):
    optimizer = OPTIMIZERS[size]
    expected = {
        name: published(
            name,
            param.dim(),
            SIZES[size]["depths"],
            optimizer["lr"],
            optimizer["paramwise_cfg"]["layer_decay_rate"],
        )
        for name, param in models[size].named_parameters()
    }
    found = settings(models[size], **optimizer)
    assert found.keys() == expected.keys() and len(found) > 600
    assert all(found[name] == pytest.approx(expected[name], rel=1e-12) for name in expected)


@pytest.mark.parametrize(
    "more",
    [
        dict(backbone_small_lr=True),
        dict(offset_lr_scale=0.1),
        dict(backbone_small_lr=True, offset_lr_scale=10.0),
    ],
    ids=str,
)
def test_scales_of_the_backbone_and_of_offsets_are_on_top(more, models):
    paramwise_cfg = OPTIMIZERS["H"]["paramwise_cfg"] | more
    found = settings(models["H"], lr=1.0, paramwise_cfg=paramwise_cfg)
    for name, param in models["H"].named_parameters():
        wanted = published(
            name,
            param.dim(),
            SIZES["H"]["depths"],
            1.0,
            0.95,
            small=more.get("backbone_small_lr", False),
            offsets=more.get("offset_lr_scale", 1.0),
        )
        assert found[name] == pytest.approx(wanted, rel=1e-12), name


class Deformable(nn.Module):
    """A head with deformable attention, and embeddings that count as the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query_embed, self.sampling_offsets, self.conv_seg = (
            nn.Embedding(3, 4),
            nn.Linear(4, 4),
            nn.Conv2d(4, 4, 1),
        )

    def layer_id(self, name: str) -> int | None:
        return 0 if name.startswith("query_embed.") else None


def test_a_head_may_have_first_layers_and_a_tenth_of_the_rate_for_its_offsets(models):
    model = nn.Module()
    model.backbone, model.decode_head = models["T"].backbone, Deformable()
    cfg = dict(num_layers=30, layer_decay_rate=0.9, depths=[4, 4, 18, 4])
    plain, dino = (settings(model, lr=1.0, paramwise_cfg=cfg | more) for more in ({}, dict(dino_head=True)))
    assert (
        plain["decode_head.query_embed.weight"]
        == dino["decode_head.query_embed.weight"]
        == (pytest.approx(0.9**31), 0.05)
    )
    assert plain["decode_head.conv_seg.weight"] == dino["decode_head.conv_seg.weight"] == (1.0, 0.05)
    assert plain["decode_head.sampling_offsets.weight"] == (1.0, 0.0)
    assert dino["decode_head.sampling_offsets.weight"] == (pytest.approx(0.1), 0.0)
    assert {name for name in plain if plain[name] != dino[name]} == {
        "decode_head.sampling_offsets.weight",
        "decode_head.sampling_offsets.bias",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(depths=[4, 4, 21, 4]),
            r"depths=\[4, 4, 21, 4\], but the levels of the backbone have \[4, 4, 18, 4\] layers",
        ),
        (dict(depths=30), "depths=30"),
        (
            dict(num_layers=33),
            r"num_layers=33, but the backbone has 30 layers \(the sum of model.backbone.depths=\[4, 4, 18, "
            r"4\]\)",
        ),
        (dict(offset_lr_scale=0), "offset_lr_scale=0 must be a number above 0"),
        (dict(dino_head=1), "dino_head=1 must be True or False"),
        (dict(dino_head=True), "dino_head=True finds no parameter"),
        (dict(layer_decay_rate=1.5), "at most 1"),
        (dict(offset_lr=0.1), "unknown key 'offset_lr' .* did you mean 'offset_lr_scale'"),
    ],
)
def test_settings_that_are_not_the_backbones_are_one_sentence(change, message, models):
    with pytest.raises(ConfigError, match=message):
        parameter_groups(
            models["T"],
            LAYER_DECAY | OPTIMIZERS["T"] | {"paramwise_cfg": OPTIMIZERS["T"]["paramwise_cfg"] | change},
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depths=[1, 3]), "InternViT6B has no levels; drop it"),
        (dict(offset_lr_scale=0.5), "finds no offsets in backbone InternViT6B"),
    ],
)
def test_settings_of_levels_and_offsets_are_not_for_a_plain_vit(change, message):
    model = build_on_meta(Config.fromfile(ROOT / TINY).model)
    with pytest.raises(ConfigError, match=message):
        parameter_groups(
            model, LAYER_DECAY | dict(lr=1.0, paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.9) | change)
        )


def test_the_queries_of_mask2former_are_of_the_first_layer():
    head = build_on_meta(
        Config.fromfile(ROOT / "configs/intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py").model
    ).decode_head
    first = {name.split(".")[0] for name, _ in head.named_parameters() if head.layer_id(name) == 0}
    assert first == {"mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat"}
    assert {head.layer_id(name) for name, _ in head.named_parameters()} == {0, None}


def test_the_tiny_experiment_of_intern_image_is_consistent():
    experiment = read_experiment(ROOT / IMAGE)
    # layers 0 to 11, with and without decay
    assert len(parameter_groups(build_on_meta(experiment.model), experiment.optimizer)) == 2 * 12
