"""The InternImage experiments: ours say what the published files say, build at full size on the meta device,
and read Cityscapes as it is distributed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.samples import first_sample
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.weight_loading import shapes_of
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.preflight.dataset_checks import validation_set
from internseg_ds.preflight.model_checks import check_classes
from tests.configs.test_recipes_on_other_data import RECIPES

CONFIGS = Path(__file__).parents[2] / "configs/intern_image"
# channels, depths, groups, crop on ADE20K, lr, layer decay, drop path, parameters with UPerNet on ADE20K as
# published
SIZES = {
    "t": (64, [4, 4, 18, 4], [4, 8, 16, 32], 512, 6e-5, 1.0, 0.2, "59M"),
    "s": (80, [4, 4, 21, 4], [5, 10, 20, 40], 512, 6e-5, 1.0, 0.3, "80M"),
    "b": (112, [4, 4, 21, 4], [7, 14, 28, 56], 512, 6e-5, 1.0, 0.4, "128M"),
    "l": (160, [5, 5, 22, 5], [10, 20, 40, 80], 640, 2e-5, 0.94, 0.4, "256M"),
    "xl": (192, [5, 5, 24, 5], [12, 24, 48, 96], 640, 2e-5, 0.94, 0.4, "368M"),
    "h": (320, [6, 6, 32, 6], [10, 20, 40, 80], 896, 2e-5, 0.95, 0.5, "1.12B"),
    "g": (512, [2, 2, 48, 4], [16, 32, 64, 128], 896, 2e-5, 0.95, 0.5, "3.11B"),  # its count is not published
}
ON_ADE20K = {
    f"ade20k/upernet_internimage_{size}_{values[3]}_160k_ade20k": size for size, values in SIZES.items()
}
ON_CITYSCAPES = {f"cityscapes/upernet_internimage_{size}_512x1024_160k_cityscapes": size for size in SIZES}
UPERNETS = ON_ADE20K | ON_CITYSCAPES
MASK2FORMER = "ade20k/mask2former_internimage_h_896_80k_cocostuff2ade20k"
SCORES = {  # published mIoU, single and multi-scale
    "ade20k": {
        "t": (47.9, 48.1),
        "s": (50.1, 50.9),
        "b": (50.8, 51.3),
        "l": (53.9, 54.1),
        "xl": (55.0, 55.3),
        "h": (59.9, 60.3),
    },
    "cityscapes": {
        "t": (82.58, 83.4),
        "s": (82.74, 83.45),
        "b": (83.18, 83.97),
        "l": (83.68, 84.41),
        "xl": (83.62, 84.28),
    },
}


def read(name: str) -> Config:
    return Config.fromfile(str(CONFIGS / f"{name}.py"))


def counted(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def test_these_are_all_the_files():
    found = {str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.py")}
    assert found == {
        *UPERNETS,
        *(f"{name}_ms" for name in UPERNETS),
        f"{MASK2FORMER}_ss",
        f"{MASK2FORMER}_ms",
        *(name.removeprefix("intern_image/") for name in RECIPES if name.startswith("intern_image/")),
    }


@pytest.mark.parametrize("name", UPERNETS)
def test_the_recipe_is_the_published_one(name: str):
    channels, depths, groups, crop, lr, decay, drop_path, _ = SIZES[UPERNETS[name]]
    large, cfg = lr == 2e-5, read(name)
    backbone, widths = cfg.model.backbone, [channels * 2**level for level in range(4)]
    large_ones = dict(
        layer_scale=None,
        dw_kernel_size=5,
        level2_post_norm=True,
        level2_post_norm_block_ids=list(range(5, depths[2], 6)),
        center_feature_scale=True,
    )
    differing = {  # from the pre-norm InternImage with a layer scale of 1: T
        "s": dict(post_norm=True),
        "b": dict(post_norm=True),
        "l": dict(post_norm=True, offset_scale=2.0),
        "xl": dict(post_norm=True, offset_scale=2.0),
        "h": dict(**large_ones, res_post_norm=True),
        "g": dict(**large_ones, post_norm=True, res_post_norm=False, with_cp=True),
    }.get(UPERNETS[name], {})
    assert {key: value for key, value in backbone.items() if key != "init_cfg"} == dict(
        type="InternImage",
        core_op="DCNv3",
        channels=channels,
        depths=depths,
        groups=groups,
        drop_path_rate=drop_path,
        mlp_ratio=4.0,
        norm_layer="LN",
        out_indices=(0, 1, 2, 3),
        **dict(dict(layer_scale=1.0, offset_scale=1.0, post_norm=False, with_cp=False), **differing),
    )
    assert (cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels) == (widths, widths[2])
    paramwise = dict(num_layers=sum(depths), layer_decay_rate=decay, depths=depths) | (
        dict(offset_lr_scale=1.0) if large else {}
    )
    assert cfg.optimizer == dict(
        type="AdamW",
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        constructor="CustomLayerDecayOptimizerConstructor",
        paramwise_cfg=paramwise,
    )
    assert cfg.optimizer_config == (dict(grad_clip=dict(max_norm=0.1, norm_type=2)) if large else {})
    assert cfg.lr_config == dict(
        policy="poly",
        warmup="linear",
        warmup_iters=1500,
        warmup_ratio=1e-6,
        power=1.0,
        min_lr=0.0,
        by_epoch=False,
    )
    assert (cfg.runner.max_iters, cfg.engine.global_batch, cfg.data.samples_per_gpu) == (
        160000,
        16,
        1 if UPERNETS[name] in "hg" else 2,
    )
    assert cfg.crop_size == ((512, 1024) if "cityscapes" in name else (crop, crop))
    assert {head.num_classes for head in (cfg.model.decode_head, cfg.model.auxiliary_head)} == {
        19 if "cityscapes" in name else 150
    }


@pytest.mark.parametrize("name", [*ON_ADE20K, f"{MASK2FORMER}_ss"])
def test_it_builds_with_the_published_number_of_parameters_in_groups_that_hold_them_all(name: str):
    experiment = read_experiment(str(CONFIGS / f"{name}.py"))
    segmentor = build_on_meta(experiment.model)
    parameters = sum(param.numel() for param in segmentor.parameters())
    assert counted(parameters) == ("1.31B" if "mask2former" in name else SIZES[UPERNETS[name]][7])
    assert (
        sum(
            param.numel()
            for group in parameter_groups(segmentor, experiment.optimizer)
            for param in group["params"]
        )
        == parameters
    )


@pytest.mark.parametrize("name", UPERNETS)
def test_the_multi_scale_file_differs_in_its_test_alone_and_both_state_the_published_score(name: str):
    single, multi = read(name), read(f"{name}_ms")
    (aug,) = [step for step in multi.data.test.pipeline if step["type"] == "MultiScaleFlipAug"]
    assert (aug.img_ratios, aug.flip, aug.img_scale) == (
        [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
        True,
        single.img_scale,
    )
    assert {key: multi.data[key] for key in ("train", "val")} == {
        key: single.data[key] for key in ("train", "val")
    }
    assert all(
        multi[key] == single[key] for key in ("model", "optimizer", "optimizer_config", "lr_config", "runner")
    )
    scores = SCORES[name.split("/")[0]].get(UPERNETS[name])
    for path, score in ((name, scores and scores[0]), (f"{name}_ms", scores and scores[1])):
        text = (CONFIGS / f"{path}.py").read_text()
        assert (
            f"Published score: {score} mIoU" if scores else "Published score: none"
        ) in text and f"configs/intern_image/{path}.py" in text


def test_the_table_of_results_names_every_file_and_score():
    text = (CONFIGS / "README.md").read_text()
    for name, size in UPERNETS.items():
        (row,) = [line for line in text.splitlines() if f"({name}.py)" in line]
        scores = SCORES[name.split("/")[0]].get(size)
        assert f"({name}_ms.py)" in row and (
            scores is None or [float(cell) for cell in row.split("|")[4].split("/")] == list(scores)
        )
    assert "62.6 / 62.9" in next(line for line in text.splitlines() if f"({MASK2FORMER}_ss.py)" in line)


def test_the_mask2former_experiment_on_camvid_has_the_backbone_of_the_upernet_one_that_it_may_start_from():
    mask2former, upernet = (
        build_on_meta(
            read_experiment(
                CONFIGS.parent / f"intern_image_tiny/{head}_intern_image_tiny_224_camvid.py"
            ).model
        )
        for head in ("mask2former", "upernet")
    )
    assert shapes_of(mask2former.backbone) == shapes_of(upernet.backbone)
    assert mask2former.decode_head.num_classes == upernet.decode_head.num_classes == 11


def test_mask2former_has_the_published_head_recipe_and_scales():
    single, multi = read(f"{MASK2FORMER}_ss"), read(f"{MASK2FORMER}_ms")
    head = single.model.decode_head
    assert (
        head.feat_channels,
        head.out_channels,
        head.num_queries,
        head.num_classes,
        head.num_transformer_feat_level,
    ) == (1024, 1024, 200, 150, 3)
    assert (head.pixel_decoder.encoder.num_layers, head.transformer_decoder.num_layers) == (6, 9)
    assert {
        layers.attn_cfgs.num_heads
        for layers in (
            head.pixel_decoder.encoder.transformerlayers,
            head.transformer_decoder.transformerlayers,
        )
    } == {32}
    assert {
        layers.ffn_cfgs.feedforward_channels
        for layers in (
            head.pixel_decoder.encoder.transformerlayers,
            head.transformer_decoder.transformerlayers,
        )
    } == {4096}
    assert (
        head.loss_cls.loss_weight,
        head.loss_mask.loss_weight,
        head.loss_dice.loss_weight,
        head.loss_cls.class_weight,
    ) == (2.0, 5.0, 5.0, [1.0] * 150 + [0.1])
    assert (
        single.model.train_cfg.num_points,
        single.model.train_cfg.oversample_ratio,
        single.model.train_cfg.importance_sample_ratio,
    ) == (12544, 3.0, 0.75)
    assert single.model.backbone.with_cp is False and single.model.backbone.level2_post_norm_block_ids == [
        5,
        11,
        17,
        23,
        29,
    ]
    assert (
        single.optimizer.lr,
        single.optimizer.paramwise_cfg.layer_decay_rate,
        single.runner.max_iters,
        single.evaluation.interval,
    ) == (1e-5, 0.95, 80000, 2000)
    assert (
        single.optimizer_config == dict(grad_clip=dict(max_norm=0.1, norm_type=2))
        and single.data.samples_per_gpu == 1
    )
    assert [step["type"] for step in single.data.train.pipeline][-3:] == [
        "ToMask",
        "DefaultFormatBundle",
        "Collect",
    ]
    for split in ("val", "test"):
        (aug,) = [step for step in multi.data[split].pipeline if step["type"] == "MultiScaleFlipAug"]
        assert (
            [round(896 * ratio) for ratio in aug.img_ratios] == [768, 832, 896, 960, 1024]
            and aug.flip
            and aug.img_scale == (3584, 896)
        )
    assert multi.model == single.model and multi.data.train == single.data.train


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two training images and one to evaluate on, in the folders and under the names of Cityscapes; label
    maps of training ids and, beside them, of all ids."""
    rng = np.random.default_rng(0)
    for split, city, count in (("train", "aachen", 2), ("val", "munster", 1)):
        for frame in range(count):
            stem = f"{city}/{city}_{frame:06d}_000019"
            labels = np.kron(rng.choice([*range(19), 255], size=(8, 16)), np.ones((16, 16))).astype(np.uint8)
            for path, array in (
                (
                    f"leftImg8bit/{split}/{stem}_leftImg8bit.png",
                    rng.integers(0, 256, (128, 256, 3), dtype=np.uint8),
                ),
                (f"gtFine/{split}/{stem}_gtFine_labelTrainIds.png", labels),
                (f"gtFine/{split}/{stem}_gtFine_labelIds.png", labels + 7),
            ):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(tmp_path / path), array)
    return tmp_path


def test_cityscapes_is_read_as_it_is_distributed(cityscapes):
    name = "cityscapes/upernet_internimage_t_512x1024_160k_cityscapes"
    experiment = read_experiment(
        str(CONFIGS / f"{name}.py"),
        {f"data.{split}.data_root": str(cityscapes) for split in ("train", "val")},
    )
    train = build_datasets(experiment.train, "data.train")
    assert len(train) == 2
    check_classes(build_on_meta(experiment.model), train, "data.train")
    sample = first_sample(train, "data.train")
    assert sample["img"].data.shape == (3, 512, 1024)
    assert set(sample["gt_semantic_seg"].data.unique().tolist()) <= {*range(19), 255}  # no label is taken off
    truth = validation_set(experiment).get_gt_seg_map_by_idx(0)
    assert np.array_equal(
        truth,
        cv2.imread(
            str(cityscapes / "gtFine/val/munster/munster_000000_000019_gtFine_labelTrainIds.png"),
            cv2.IMREAD_UNCHANGED,
        ),
    )
