"""Gradients of blocks that ZeRO-3 handles as one, where the block's input asks for none: after frozen layers,
and where blocks take the image."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from mmcv import ConfigDict

from internseg_ds.config.ds_config import BackboneSizes, DsConfig, resolve_ds_config
from internseg_ds.distributed.block_hooks import require_input_gradients
from internseg_ds.distributed.construction import build_for_training, build_on_meta, freeze_parts
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.errors import ConfigError
from internseg_ds.models.repeated_blocks import RepeatedBlock, repeated_block, unhookable_blocks
from tests.distributed.ranks import spawn

IMAGE = (2, 3, 32, 32)
RESNET = dict(
    type="ResNet",
    depth=18,
    base_channels=8,
    stem_channels=8,
    num_stages=2,
    out_indices=(0, 1),
    strides=(1, 2),
    dilations=(1, 1),
    norm_eval=True,
    zero_init_residual=False,
)
VIT = dict(
    type="VisionTransformer",
    img_size=(32, 32),
    patch_size=8,
    embed_dims=16,
    num_layers=3,
    num_heads=2,
    out_indices=(2,),
)


class TakesTheImage(torch.nn.Module):
    """A backbone each of whose repeated blocks takes the image."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (
                torch.nn.Conv2d(3, 8, 3, padding=1),
                torch.nn.Conv2d(8, 16, 3, padding=1),
            )

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(image).relu())

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (sum(block(image) for block in self.blocks),)


def model_of(name: str) -> ConfigDict:
    if name == "image":
        from mmseg.models.builder import BACKBONES

        BACKBONES.register_module(TakesTheImage, force=True)
        backbone, channels = dict(type="TakesTheImage"), 16
    else:
        backbone, channels = {"resnet": (dict(RESNET, frozen_stages=1), 16), "vit": (VIT, 16)}[name]
    return ConfigDict(
        type="EncoderDecoder",
        backbone=backbone,
        test_cfg=dict(mode="whole"),
        train_cfg=dict(),
        decode_head=dict(
            type="FCNHead",
            in_channels=channels,
            channels=channels,
            num_convs=0,
            concat_input=False,
            num_classes=3,
            in_index=-1,
            dropout_ratio=0.0,
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss"),
        ),
    )


def ds_config(zero: dict, world_size: int = 2, block: RepeatedBlock | None = None) -> DsConfig:
    return resolve_ds_config(
        {"zero_optimization": zero},
        experiment="",
        micro_batch=2,
        world_size=world_size,
        optimizer={"type": "SGD"},
        sizes=BackboneSizes(block=block),
    )


FREEZE = {"vit": ["backbone.layers.0", "backbone.patch_embed", "backbone.cls_token", "backbone.pos_embed"]}


def blocks_train_as_in_plain_pytorch(name: str) -> None:
    deepspeed.init_distributed(verbose=False)
    config, device = model_of(name), torch.device("cpu")
    block = repeated_block(build_on_meta(config).backbone)
    ds = ds_config(
        {
            "stage": 3,
            "leaf_module": "auto",
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
        },
        block=block,
    )
    models = [build_for_training(config, each, device, seed=0) for each in (ds_config({"stage": 1}), ds)]
    for model in models:
        freeze_parts(model, FREEZE.get(name, ()))
    plain, sharded = models
    optimizers = [
        torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
        for model in models
    ]
    engine, *_ = deepspeed.initialize(model=sharded, optimizer=optimizers[1], config=ds.raw)
    require_input_gradients(engine.module)
    leaves = deepspeed.utils.get_z3_leaf_modules(engine.module)
    assert {f"{type(leaf).__module__}.{type(leaf).__qualname__}" for leaf in leaves} == {block.class_name}
    start = {key: param.detach().clone() for key, param in plain.named_parameters()}
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        batch = {
            "img": torch.randn(IMAGE),
            "img_metas": [{}] * 2,
            "gt_semantic_seg": torch.randint(0, 3, (2, 1, 32, 32)),
        }
        optimizers[0].zero_grad()
        expected = plain(return_loss=True, **batch)["decode.loss_ce"]
        expected.backward()
        for param in plain.parameters():
            if param.requires_grad:
                dist.all_reduce(param.grad)
                param.grad /= 2
        optimizers[0].step()
        found = engine(return_loss=True, **batch)["decode.loss_ce"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        engine.backward(found)
        engine.step()
    blocks = tuple(
        f"{key}."
        for key, module in plain.named_modules()
        if f"{type(module).__module__}.{type(module).__qualname__}" == block.class_name
    )
    for key, param in engine.module.named_parameters():
        whole = dict(plain.named_parameters())[key]
        with gathered([param]):
            torch.testing.assert_close(
                param.data, whole.data, rtol=1e-4, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}"
            )
        assert torch.equal(whole, start[key]) != whole.requires_grad or not key.startswith(blocks), key


@pytest.mark.parametrize("name", ["resnet", "vit", "image"])
def test_blocks_after_frozen_layers_and_blocks_that_take_the_image_learn_what_they_do_in_plain_pytorch(name):
    spawn(blocks_train_as_in_plain_pytorch, 2, name)


def test_a_block_that_takes_a_list_is_told_from_one_that_hooks_can_see():
    backbone = {
        "type": "HRNet",
        "norm_eval": False,
        "extra": {
            f"stage{number}": {
                "num_modules": 1 + (number == 3),
                "num_branches": number,
                "block": "BOTTLENECK" if number == 1 else "BASIC",
                "num_blocks": (1,) * number,
                "num_channels": (8, 16, 32, 64)[:number],
            }
            for number in (1, 2, 3, 4)
        },
    }
    for config, odd in (
        (ConfigDict(model_of("resnet"), backbone=backbone), True),
        (model_of("resnet"), False),
    ):
        model = build_on_meta(config).eval()
        name = repeated_block(model.backbone).class_name
        with unhookable_blocks(model, [name]) as found:
            model.extract_feat(torch.empty(1, 3, 64, 64, device="meta"))
        assert found == ({name} if odd else set())


def test_a_frozen_module_neither_trains_nor_moves_its_statistics_and_a_wrong_name_names_the_nearest():
    model = build_for_training(
        ConfigDict(model_of("resnet"), backbone=dict(RESNET, norm_eval=False)),
        ds_config({"stage": 1}, world_size=1),
        torch.device("cpu"),
        0,
    )
    freeze_parts(model, ["backbone.layer1", "decode_head.conv_seg.bias"])
    before = model.backbone.layer1[0].bn1.running_mean.clone()
    model.train().extract_feat(torch.randn(IMAGE))
    assert torch.equal(model.backbone.layer1[0].bn1.running_mean, before) and not torch.equal(
        model.backbone.bn1.running_mean, before
    )
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("backbone.layer1.", "decode_head.conv_seg.bias"))
    }
    with pytest.raises(ConfigError, match=r"'backbone\.layer_1'.*'backbone\.layer1'"):
        freeze_parts(model, ["backbone.layer_1"])
