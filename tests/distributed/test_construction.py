import copy

import deepspeed
import pytest
import torch
from mmcv import Config, ConfigDict
from mmseg.models import build_segmentor

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.distributed.construction import build_for_training, build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.weight_loading import load, match_segmentor
from internseg_ds.errors import ConfigError
from internseg_ds.models.backbone import pretrained_file
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn


def small() -> Config:
    model = Config.fromfile(ROOT / TINY).model
    model.backbone.update(embed_dim=32, num_heads=2)
    model.decode_head.update(in_channels=[32] * 4, channels=15)  # 15: sizes that 2 ranks cannot halve
    model.auxiliary_head.update(in_channels=32, channels=15)
    return model


def ds_config(stage: int, world_size: int = 1, bf16: bool = True):
    return resolve_ds_config(
        {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}},
        experiment="",
        micro_batch=1,
        world_size=world_size,
        optimizer={"type": "AdamW", "lr": 1e-3},
    )


def plain(seed: int = 0) -> dict[str, torch.Tensor]:
    return build_for_training(small(), ds_config(1, bf16=False), torch.device("cpu"), seed).state_dict()


def partitioned_values_are_the_plain_ones(seed: int, bf16: bool) -> None:
    deepspeed.init_distributed(verbose=False)  # as `join` does
    model = build_for_training(small(), ds_config(3, world_size=2, bf16=bf16), torch.device("cpu"), seed)
    assert model.backbone.blocks[0].attn.qkv.weight.numel() == 0  # really partitioned
    expected = plain(seed)
    for name, param in model.named_parameters():
        with gathered([param]):
            assert torch.equal(param.data, expected[name].to(torch.bfloat16 if bf16 else torch.float32)), name
    for name, buffer in model.named_buffers():
        # statistics are fp32 before anybody reads values into them
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("bf16", [True, False])
def test_zero3_on_2_ranks_starts_from_the_same_values_as_a_plain_model(bf16):
    spawn(partitioned_values_are_the_plain_ones, 2, 0, bf16)


def test_the_seed_decides_the_values():
    first, again, other = plain(0), plain(0), plain(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["backbone.blocks.0.attn.qkv.weight"], other["backbone.blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("backbone.blocks.1.mlp.fc1.weight", 0.02),
        ("backbone.pos_embed", 0.02),
        ("backbone.up1.0.weight", (2 / (4 * 32)) ** 0.5),
        ("decode_head.conv_seg.weight", 0.01),
        ("decode_head.fpn_bottleneck.conv.weight", (2 / (9 * 15)) ** 0.5),  # kaiming, fan out
    ],
)
def test_values_are_drawn_as_the_modules_say(name, std):
    assert float(plain()[name].std()) == pytest.approx(std, rel=0.15)


def test_no_two_blocks_start_alike():
    values = plain()
    assert not torch.equal(
        values["backbone.blocks.0.attn.qkv.weight"], values["backbone.blocks.1.attn.qkv.weight"]
    )


def test_a_model_on_meta_takes_no_memory():
    assert all(param.is_meta for param in build_on_meta(small()).parameters())


def scaled() -> ConfigDict:
    """A head with parameters that have no dimensions."""
    model = small()
    model.decode_head = dict(
        type="DAHead",
        in_channels=32,
        in_index=0,
        channels=16,
        pam_channels=8,
        num_classes=5,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    )
    return model


SCALE = "decode_head.pam.gamma.scale"


def parameters_without_dimensions_are_partitioned() -> None:
    deepspeed.init_distributed(verbose=False)
    model = build_for_training(scaled(), ds_config(3, world_size=2), torch.device("cpu"), 0)
    assert dict(model.named_parameters())[SCALE].ds_shape == (1,)


def test_parameters_without_dimensions_are_vectors_under_zero3():
    spawn(parameters_without_dimensions_are_partitioned, 2)


def test_mmsegs_files_and_ours_hold_parameters_without_dimensions_alike(tmp_path):
    theirs, ours = (
        build_segmentor(scaled()),
        build_for_training(scaled(), ds_config(1, bf16=False), torch.device("cpu"), 0),
    )
    assert theirs.state_dict()[SCALE].shape == () and ours.state_dict()[SCALE].shape == build_on_meta(
        scaled()
    ).state_dict()[SCALE].shape == (1,)
    theirs.state_dict()[SCALE].fill_(3.0)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    load(ours, match_segmentor(ours, open_weights(tmp_path / "theirs.pth")))
    assert ours.state_dict()[SCALE].item() == 3.0
    ours.state_dict()[SCALE].fill_(4.0)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict()[SCALE].item() == 4.0


def test_several_auxiliary_heads_are_initialised_as_one_is():
    model = small()
    model.auxiliary_head = [model.auxiliary_head, model.auxiliary_head]
    values = build_for_training(model, ds_config(1, bf16=False), torch.device("cpu"), 0).state_dict()
    first, second = (values[f"auxiliary_head.{place}.conv_seg.weight"] for place in (0, 1))
    assert not torch.equal(first, second)
    assert all(float(weight.std()) == pytest.approx(0.01, rel=0.15) for weight in (first, second))


@pytest.mark.parametrize("setting", ["model.pretrained", "init_cfg"])
def test_a_config_that_names_weights_in_either_of_mmsegs_ways_can_be_built_again_and_again(setting):
    vit = dict(
        type="InternViT6B",
        img_size=28,
        patch_size=14,
        embed_dim=12,
        depth=1,
        num_heads=3,
        out_indices=[0],
        use_flash_attn=False,
    )
    model = ConfigDict(
        type="EncoderDecoder",
        train_cfg={},
        test_cfg=dict(mode="whole"),
        backbone=vit,
        decode_head=dict(type="FCNHead", in_channels=12, channels=4, num_classes=3),
    )
    if setting == "init_cfg":
        model.backbone.init_cfg = dict(type="Pretrained", checkpoint="vit.pth")
    else:
        model.pretrained = "vit.pth"
    before = copy.deepcopy(model)
    for _ in range(2):
        assert pretrained_file(build_on_meta(model).backbone) == "vit.pth"
    assert model == before


def test_values_that_only_constructors_draw_depend_on_the_seed_alone():
    model = small()
    model.auxiliary_head = dict(
        type="EncHead",
        in_channels=(32, 32, 32),
        in_index=(1, 2, 3),
        channels=16,
        num_codes=4,
        num_classes=3,
        loss_decode=dict(type="CrossEntropyLoss"),
        loss_se_decode=dict(type="CrossEntropyLoss", use_sigmoid=True),
    )

    def codewords(seed: int) -> torch.Tensor:
        built = build_for_training(model, ds_config(1, bf16=False), torch.device("cpu"), seed)
        return built.auxiliary_head.enc_module.encoding[-3].codewords

    first = codewords(0)
    torch.rand(7)  # whatever else was drawn meanwhile
    assert torch.equal(first, codewords(0)) and not torch.equal(first, codewords(1))


def cannot_be_partitioned() -> None:
    deepspeed.init_distributed(verbose=False)
    model = small()
    model.backbone = dict(type="TimmBackbone", model_name="convit_tiny", out_indices=(2, 5, 8, 11))
    with pytest.raises(ConfigError, match=r"ZeRO-3.* ZeRO-1 or 2"):
        build_for_training(model, ds_config(3), torch.device("cpu"), 0)


def test_a_constructor_that_computes_with_its_parameters_is_an_error_under_zero3():
    spawn(cannot_be_partitioned, 1)
