"""The experiment files: each builds at its full size on the meta device, with the published names, shapes and
numbers, and trains what it says."""

from pathlib import Path

import pytest
import torch
from mmcv import Config
from mmseg.models import build_segmentor
from torch import nn

import internseg_ds.models  # noqa: F401 - registers the backbone and the head
from tests.configs.test_recipes_on_other_data import RECIPES

CONFIGS = Path(__file__).parents[2] / "configs"
# file: (mIoU, steps, warmup, layer decay, weight decay, drop path, frozen, training images or None for all)
PUBLISHED = {
    "full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5": (
        58.9,
        80000,
        1500,
        0.95,
        0.05,
        0.4,
        False,
        None,
    ),
    "head_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen": (
        54.9,
        80000,
        1500,
        1.0,
        0.05,
        0.0,
        True,
        None,
    ),
    "linear_probing/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen": (
        47.2,
        80000,
        1500,
        1.0,
        0.0,
        0.0,
        True,
        None,
    ),
    "few_shot/linear_intern_vit_6b_504_5k_ade20k_bs16_lr4e-5_1of16": (
        46.5,
        5000,
        100,
        0.95,
        0.05,
        0.4,
        False,
        1263,
    ),
    "few_shot/linear_intern_vit_6b_504_10k_ade20k_bs16_lr4e-5_1of8": (
        50.0,
        10000,
        200,
        0.95,
        0.05,
        0.4,
        False,
        2526,
    ),
    "few_shot/linear_intern_vit_6b_504_20k_ade20k_bs16_lr4e-5_1of4": (
        53.3,
        20000,
        400,
        0.95,
        0.05,
        0.4,
        False,
        5052,
    ),
    "few_shot/linear_intern_vit_6b_504_40k_ade20k_bs16_lr4e-5_1of2": (
        55.8,
        40000,
        800,
        0.95,
        0.05,
        0.4,
        False,
        10105,
    ),
    "few_shot/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_1of1": (
        57.2,
        80000,
        1500,
        0.95,
        0.05,
        0.4,
        False,
        None,
    ),
}
ADAPTER = "vit_adapter/upernet_intern_vit_adapter_6b_512_80k_ade20k_bs16_lr4e-5"
BLOCK = {
    "norm1.weight": (3200,),
    "attn.qkv.weight": (9600, 3200),
    "attn.q_norm.weight": (3200,),
    "attn.k_norm.weight": (3200,),
    "attn.proj.weight": (3200, 3200),
    "attn.proj.bias": (3200,),
    "ls1.gamma": (3200,),
    "norm2.weight": (3200,),
    "mlp.fc1.weight": (12800, 3200),
    "mlp.fc1.bias": (12800,),
    "mlp.fc2.weight": (3200, 12800),
    "mlp.fc2.bias": (3200,),
    "ls2.gamma": (3200,),
}
EMBEDDINGS = {
    "pos_embed": (1, 1 + 36 * 36, 3200),
    "cls_token": (1, 1, 3200),
    "patch_embed.proj.weight": (3200, 3, 14, 14),
    "patch_embed.proj.bias": (3200,),
}
PYRAMID = {
    "up1.0.weight": (3200, 3200, 2, 2),
    "up1.0.bias": (3200,),
    "up1.1.weight": (3200,),
    "up1.1.bias": (3200,),
    "up1.3.weight": (3200, 3200, 2, 2),
    "up1.3.bias": (3200,),
    "up2.0.weight": (3200, 3200, 2, 2),
    "up2.0.bias": (3200,),
}


def read(name: str) -> Config:
    return Config.fromfile(str(CONFIGS / "intern_vit_6b" / f"{name}.py"))


def on_meta(cfg: Config) -> nn.Module:
    with torch.device("meta"):
        return build_segmentor(cfg.model)


def test_these_are_all_the_files():
    found = {
        str(path.relative_to(CONFIGS / "intern_vit_6b").with_suffix(""))
        for path in (CONFIGS / "intern_vit_6b").rglob("*.py")
    }
    on_other_data = {
        name.removeprefix("intern_vit_6b/") for name in RECIPES if name.startswith("intern_vit_6b/")
    }
    assert found == {*PUBLISHED, ADAPTER} | on_other_data


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_have_the_published_names_and_shapes(name: str):
    segmentor = on_meta(read(name))
    blocks = {f"blocks.{n}.{part}": shape for n in range(48) for part, shape in BLOCK.items()}
    wanted = {**EMBEDDINGS, **blocks, **(PYRAMID if "upernet" in name else {})}
    assert {key: tuple(param.shape) for key, param in segmentor.backbone.named_parameters()} == wanted
    assert {sum(param.numel() for param in block.parameters()) for block in segmentor.backbone.blocks} == {
        122_918_400
    }
    head = {key: tuple(param.shape) for key, param in segmentor.decode_head.named_parameters()}
    if "upernet" in name:
        assert segmentor.decode_head.in_channels == [3200] * 4 and head["conv_seg.weight"] == (
            150,
            1536,
            1,
            1,
        )
        assert {key: tuple(param.shape) for key, param in segmentor.auxiliary_head.named_parameters()} == {
            "convs.0.conv.weight": (1536, 3200, 3, 3),
            "convs.0.bn.weight": (1536,),
            "convs.0.bn.bias": (1536,),
            "conv_seg.weight": (150, 1536, 1, 1),
            "conv_seg.bias": (150,),
        }
    else:
        assert head == {
            "conv_seg.weight": (150, 3200, 1, 1),
            "conv_seg.bias": (150,),
            "norm.weight": (3200,),
            "norm.bias": (3200,),
        }
        assert not segmentor.with_auxiliary_head


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_trains_is_what_the_name_says(name: str):
    segmentor = on_meta(read(name))
    trains = {
        ".".join(key.split(".")[:2]) if key.startswith("backbone") else key.split(".")[0]
        for key, param in segmentor.named_parameters()
        if param.requires_grad
    }
    vit = {"backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed", "backbone.blocks"}
    heads = (
        {"decode_head", "auxiliary_head", "backbone.up1", "backbone.up2"}
        if "upernet" in name
        else {"decode_head"}
    )
    assert trains == heads | (set() if PUBLISHED[name][6] else vit)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_the_published_one(name: str):
    miou, steps, warmup, layer_decay, weight_decay, drop_path, frozen, images = PUBLISHED[name]
    cfg = read(name)
    assert cfg.runner == dict(type="IterBasedRunner", max_iters=steps)
    assert cfg.lr_config == dict(
        policy="poly",
        warmup="linear",
        warmup_iters=warmup,
        warmup_ratio=1e-6,
        power=1.0,
        min_lr=0.0,
        by_epoch=False,
    )
    assert cfg.optimizer == dict(
        type="AdamW",
        lr=4e-5,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        constructor="CustomLayerDecayOptimizerConstructor",
        paramwise_cfg=dict(num_layers=48, layer_decay_rate=layer_decay),
    )
    assert (cfg.model.backbone.drop_path_rate, cfg.model.backbone.freeze_vit) == (drop_path, frozen)
    assert cfg.data.train.get("max_image_num") == images
    assert (cfg.data.samples_per_gpu, cfg.data.workers_per_gpu, cfg.engine.global_batch) == (2, 4, 16)
    assert cfg.checkpoint_config == dict(by_epoch=False, interval=1000, max_keep_ckpts=2)
    assert cfg.evaluation == dict(interval=1000, metric="mIoU", pre_eval=True, save_best="auto")
    assert cfg.model.test_cfg == dict(mode="slide", crop_size=(504, 504), stride=(322, 322))
    text = (CONFIGS / "intern_vit_6b" / f"{name}.py").read_text()
    assert f"{miou} mIoU" in text and f"configs/intern_vit_6b/{name}.py" in text


def test_only_head_tuning_moves_the_auxiliary_head():
    index = {
        name.split("/")[0]: read(name).model.auxiliary_head.in_index
        for name in PUBLISHED
        if "upernet" in name
    }
    assert index == {"full_tuning": 2, "head_tuning": 1}


def test_the_linear_probe_reads_block_45_and_few_shot_the_last():
    assert {
        name.split("/")[0]: list(read(name).model.backbone.out_indices)
        for name in PUBLISHED
        if "linear" in name
    } == {"linear_probing": [44], "few_shot": [47]}


@pytest.mark.parametrize("name", ["upernet_intern_vit_tiny_112_ade20k", "upernet_intern_vit_tiny_224_camvid"])
def test_the_tiny_experiments_train_a_step_and_predict(name: str):
    from internseg_ds.distributed.batch_norms import allow_any_device

    cfg = Config.fromfile(str(CONFIGS / "intern_vit_tiny" / f"{name}.py"))
    segmentor = build_segmentor(cfg.model)
    allow_any_device(segmentor)
    crop, classes = cfg.crop_size[0], cfg.model.decode_head.num_classes
    metas = [
        dict(
            img_shape=(crop, crop, 3),
            ori_shape=(crop, crop, 3),
            pad_shape=(crop, crop, 3),
            flip=False,
            scale_factor=1.0,
            filename="",
        )
    ] * 2
    losses = segmentor.train().forward_train(
        torch.randn(2, 3, crop, crop), metas, torch.randint(0, classes, (2, 1, crop, crop))
    )
    (losses["decode.loss_ce"] + losses["aux.loss_ce"]).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in segmentor.parameters())
    wide = [[dict(metas[0], img_shape=(crop, crop + 28, 3), ori_shape=(crop, crop + 28, 3))]]
    with torch.no_grad():
        (labels,) = segmentor.eval().forward([torch.randn(1, 3, crop, crop + 28)], wide, return_loss=False)
    assert labels.shape == (crop, crop + 28) and labels.max() < classes


def test_the_adapter_config_is_the_published_one_around_a_frozen_vit():
    cfg = read(ADAPTER)
    model = on_meta(cfg)
    assert (
        cfg.optimizer.paramwise_cfg == dict(num_layers=48, layer_decay_rate=0.95) and cfg.optimizer.lr == 4e-5
    )
    assert (
        cfg.model.test_cfg == dict(mode="slide", crop_size=(512, 512), stride=(341, 341))
        and cfg.model.auxiliary_head.in_index == 2
    )
    shapes = {name: tuple(param.shape) for name, param in model.backbone.named_parameters()}
    assert {
        name.removeprefix("blocks.47."): shape
        for name, shape in shapes.items()
        if name.startswith("blocks.47.")
    } == BLOCK
    assert shapes["interactions.3.extra_extractors.1.ffn.dwconv.dwconv.weight"] == (800, 1, 3, 3)
    assert shapes["interactions.0.injector.attn.value_proj.weight"] == (800, 3200) and shapes[
        "level_embed"
    ] == (3, 3200)
    assert not any(
        param.requires_grad
        for name, param in model.backbone.named_parameters()
        if name.startswith(("blocks.", "patch_embed", "pos_embed"))
    )
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) == 500_747_524
