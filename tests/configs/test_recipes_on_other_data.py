"""The published recipes on other data sets than ADE20K: ours say what OpenGVLab's files say, and pass every check of
a start on small trees in the layouts of their data sets."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.process_group import World
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.preflight.preflight import check
from tests.conftest import ROOT
from tests.data_report.data_set_trees import TREES

CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Recipe:
    """As published. layouts: of the data trained on and scored on."""

    layouts: tuple[str, ...]
    classes: int
    crop: tuple[int, int]
    batch: tuple[int, int]  # GPUs, images of each
    steps: int
    lr: float
    layer_decay: float
    clipped: bool
    millions: int  # of parameters, which train or not
    scores: tuple[float, ...] = ()  # at one scale, at several
    starts_from: str | None = None
    window: tuple[int, int] | None = None  # and its stride
    masks: bool = False


def levels(millions, **differing):
    """UPerNet or SegFormer's head on InternImage-L or -XL."""
    common = dict(classes=19, crop=(512, 1024), batch=(8, 2), lr=2e-5, layer_decay=0.94, clipped=True)
    return Recipe(**common, millions=millions, **differing)


BEFORE = dict(layouts=("mapillary", "cityscapes"), steps=80000)
AFTER = dict(layouts=("cityscapes_extra",), steps=160000)
HUGE = dict(layer_decay=0.95, masks=True)
HUGE_256 = dict(**HUGE, millions=1094)
VIT = dict(
    layouts=("coco_stuff164k",),
    classes=171,
    crop=(504, 504),
    batch=(8, 2),
    steps=80000,
    lr=4e-5,
    clipped=False,
    window=(504, 322),
)
RECIPES = {
    "intern_image/mapillary/upernet_internimage_l_512x1024_80k_mapillary": levels(256, **BEFORE),
    "intern_image/mapillary/upernet_internimage_xl_512x1024_80k_mapillary": levels(368, **BEFORE),
    "intern_image/mapillary/segformer_internimage_l_512x1024_80k_mapillary": levels(220, **BEFORE),
    "intern_image/mapillary/segformer_internimage_xl_512x1024_80k_mapillary": levels(330, **BEFORE),
    "intern_image/cityscapes/upernet_internimage_l_512x1024_160k_mapillary2cityscapes": levels(
        256, **AFTER, scores=(85.94, 86.22), starts_from="upernet_internimage_l_512x1024_80k_mapillary"
    ),
    "intern_image/cityscapes/upernet_internimage_xl_512x1024_160k_mapillary2cityscapes": levels(
        368, **AFTER, scores=(86.20, 86.42), starts_from="upernet_internimage_xl_512x1024_80k_mapillary"
    ),
    "intern_image/cityscapes/segformer_internimage_l_512x1024_160k_mapillary2cityscapes": levels(
        220, **AFTER, scores=(85.16, 85.67), starts_from="segformer_internimage_l_512x1024_80k_mapillary"
    ),
    "intern_image/cityscapes/segformer_internimage_xl_512x1024_160k_mapillary2cityscapes": levels(
        330,
        **AFTER,
        scores=(85.41, 85.93),
        starts_from="segformer_internimage_xl_512x1024_80k_mapillary",
    ),
    "intern_image/mapillary/mask2former_internimage_h_896x896_80k_mapillary": Recipe(
        ("mapillary", "cityscapes"),
        19,
        (896, 896),
        (16, 2),
        80000,
        2e-5,
        clipped=True,
        window=(896, 512),
        **HUGE_256,
    ),
    "intern_image/cityscapes/mask2former_internimage_h_1024x1024_80k_mapillary2cityscapes": Recipe(
        ("cityscapes_extra",),
        19,
        (1024, 1024),
        (8, 2),
        80000,
        1e-5,
        clipped=True,
        scores=(86.37, 86.96),
        starts_from="mask2former_internimage_h_896x896_80k_mapillary",
        window=(1024, 512),
        **HUGE_256,
    ),
    "intern_image/coco_stuff164k/mask2former_internimage_h_896_80k_cocostuff164k": Recipe(
        ("coco_stuff164k",),
        171,
        (896, 896),
        (16, 1),
        80000,
        2e-5,
        clipped=False,
        millions=1314,
        scores=(52.6,),
        **HUGE,
    ),
    "intern_image/coco_stuff10k/mask2former_internimage_h_512_40k_cocostuff164k_to_10k": Recipe(
        ("coco_stuff10k",),
        171,
        (512, 512),
        (16, 1),
        40000,
        1e-5,
        clipped=False,
        millions=1314,
        scores=(59.2, 59.6),
        starts_from="mask2former_internimage_h_896_80k_cocostuff164k",
        **HUGE,
    ),
    "intern_image/pascal_context/mask2former_internimage_h_480_40k_pascal_context_59": Recipe(
        ("pascal_context_59",),
        59,
        (480, 480),
        (16, 1),
        40000,
        2e-5,
        clipped=False,
        scores=(69.7, 70.3),
        **HUGE_256,
    ),
    "intern_image/nyu_depth_v2/mask2former_internimage_h_480_40k_nyu": Recipe(
        ("nyu_depth_v2",),
        40,
        (480, 480),
        (16, 1),
        40000,
        2e-5,
        clipped=False,
        scores=(67.1, 68.1),
        **HUGE_256,
    ),
    "intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_cocostuff164k_bs16_lr4e-5": Recipe(
        **VIT, layer_decay=0.95, millions=6386
    ),
    "intern_vit_6b/head_tuning/upernet_intern_vit_6b_504_80k_cocostuff164k_bs16_lr4e-5_frozen": Recipe(
        **VIT, layer_decay=1.0, millions=6386
    ),
    "intern_vit_6b/linear_probing/linear_intern_vit_6b_504_80k_cocostuff164k_bs16_lr4e-5_frozen": Recipe(
        **VIT, layer_decay=1.0, millions=5907
    ),
}


def read(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_is_the_published_one(name):
    recipe, cfg = RECIPES[name], read(name)
    gpus, images = recipe.batch
    assert (cfg.engine.global_batch, cfg.data.samples_per_gpu) == (gpus * images, images)
    assert (cfg.runner.max_iters, cfg.optimizer.lr) == (recipe.steps, recipe.lr)
    assert cfg.optimizer.paramwise_cfg.layer_decay_rate == recipe.layer_decay
    assert (cfg.optimizer.type, cfg.optimizer.weight_decay) == ("AdamW", 0.0 if "linear" in name else 0.05)
    assert (cfg.lr_config.warmup_iters, cfg.lr_config.power, cfg.lr_config.min_lr) == (1500, 1.0, 0.0)
    assert cfg.optimizer_config == (dict(grad_clip=dict(max_norm=0.1, norm_type=2)) if recipe.clipped else {})
    weights = recipe.starts_from and f"./pretrained/{recipe.starts_from}.pth"
    assert cfg.load_from == weights
    assert (cfg.model.backbone.get("init_cfg", cfg.model.backbone.get("pretrained")) is None) == bool(weights)
    steps = {step["type"]: step for step in cfg.data.train.pipeline}
    assert (
        cfg.crop_size == steps["RandomCrop"]["crop_size"] == recipe.crop
        and ("ToMask" in steps) == recipe.masks
    )
    assert ("MapillaryHack" in steps) == (recipe.layouts[0] == "mapillary")
    window = recipe.window and ((recipe.window[0],) * 2, (recipe.window[1],) * 2)
    assert (cfg.model.test_cfg.get("crop_size"), cfg.model.test_cfg.get("stride")) == (window or (None, None))
    heads = [cfg.model[key] for key in ("decode_head", "auxiliary_head") if key in cfg.model]
    assert {head.num_classes for head in heads} == {recipe.classes}
    if recipe.masks:
        assert heads[0].loss_cls.class_weight == [1.0] * recipe.classes + [0.1]


@pytest.mark.parametrize("name", RECIPES)
def test_it_states_the_published_score_and_its_command_and_so_does_the_table(name):
    recipe, folder = RECIPES[name], name.split("/")[0]
    text, table = ((CONFIGS / path).read_text() for path in (f"{name}.py", f"{folder}/README.md"))
    assert f"launch/train.py configs/{name}.py" in text
    (row,) = [line for line in table.splitlines() if f"({name.removeprefix(folder + '/')}.py)" in line]
    _, _, _, _, published, ours, *_ = (cell.strip() for cell in row.split("|"))
    assert ours == "not measured"
    if not recipe.scores:
        assert "Published score: none" in text and published in ("none", "none, a start for Cityscapes")
        return
    assert [float(score) for score in published.split(" / ")] == list(recipe.scores)
    stated = " ".join(text.split())
    assert f"Published score: {published.split(' / ')[0]} mIoU" in stated
    assert len(recipe.scores) == 1 or f"({published.split(' / ')[1]} multi-scale)" in stated


@pytest.fixture
def in_a_tree(tmp_path, monkeypatch):
    def enter(layouts: tuple[str, ...]) -> Path:
        for layout in layouts:
            TREES[layout](tmp_path, layout)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return enter


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_has_the_published_size_and_passes_every_check_of_a_start(name, in_a_tree):
    in_a_tree(RECIPES[name].layouts)
    cfg = read(name)
    cfg.load_from = None
    for key in ("pretrained", "init_cfg"):
        cfg.model.backbone.pop(key, None)
    experiment = read_experiment(cfg)
    model = build_on_meta(experiment.model)
    count = sum(param.numel() for param in model.parameters())
    assert round(count / 1e6) in (RECIPES[name].millions, RECIPES[name].millions - 1)
    groups = parameter_groups(model, experiment.optimizer)
    trains = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert sum(param.numel() for group in groups for param in group["params"]) == trains
    plan = check(experiment, ROOT / "ds_configs/zero3_bf16.json", World())
    assert plan.warnings == () and plan.crop == RECIPES[name].crop
