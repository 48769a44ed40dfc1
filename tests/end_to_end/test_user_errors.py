"""Wrong input ends before anything is built, with one sentence from rank 0 and exit code 2."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mmcv import ConfigDict, DictAction
from mmseg.datasets import build_dataset
from mmseg.models import build_head
from torch import nn

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import CheckpointError, ConfigError, UserError
from internseg_ds.preflight.model_checks import check_thresholds
from internseg_ds.preflight.preflight import check
from internseg_ds.training.resume.find_checkpoint import compare_with_checkpoint
from tests.conftest import MASK2FORMER, ROOT, TINY, data_options
from tests.end_to_end.conftest import SMALL, checked, experiment_of


def test_rank_0_says_it_once_and_the_launcher_ends_with_2(launch, tmp_path):
    done = launch(
        "launch/train.py",
        TINY,
        "--work-dir",
        tmp_path / "work",
        "--cfg-options",
        "data.train.data_root=/nowhere",
        launcher="deepspeed",
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "/nowhere" in line and line.startswith("error:")
    ]
    assert len(said) == 1 and "data_root" in said[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work").exists()


def refusal(config: str, options: dict, ade20k: Path) -> str:
    """What the checks before a run say of a config with these options."""
    with pytest.raises(UserError) as caught:
        checked(experiment_of(config, ade20k, options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"model.test_cfg.crop_size": (100, 112)},
            ["model.test_cfg.crop_size", "patch size 14", "98 or 112"],
        ),
        ({"model.test_cfg.stride": (200, 70)}, ["stride", "crop_size"]),
        ({"model.backbone.img_size": 113}, ["img_size=113", "patch_size=14", "112 or 126"]),
        ({"model.backbone.out_indices": [0, 1, 2, 9]}, ["out_indices", "depth=4"]),
        ({"model.backbone.typo": 1}, ["typo"]),
        ({"model.backbone.type": "NoSuchViT"}, ["NoSuchViT"]),
        (
            {"model.backbone.num_head": 4},
            ["unexpected keyword argument 'num_head'; did you mean 'num_heads'?"],
        ),
        (
            {"data.train.pipeline.2.ratio_rang": (0.5, 2.0)},
            ["unexpected keyword argument 'ratio_rang'; did you mean 'ratio_range'?"],
        ),
        (
            {"data.train.img_sufix": ".jpg"},
            ["unexpected keyword argument 'img_sufix'; did you mean 'img_suffix'?"],
        ),
        ({"model.decode_head.num_classes": 19}, ["num_classes=19", "150"]),
        (
            {"model.backbone.pretrained": "nowhere.pth"},
            ["model.backbone.pretrained", "nowhere.pth", "no such file"],
        ),
        ({"load_from": "nowhere.pth"}, ["load_from", "nowhere.pth"]),
        (
            {"model.backbone.pretrained": ""},
            [
                "model.backbone.pretrained=''",
                "must be a path",
                "--cfg-options model.backbone.pretrained=None",
            ],
        ),
        ({"data.val.img_dir": "images/nothing"}, ["data.val", "images/nothing"]),
        (
            {"optimizer.paramwise_cfg": {"num_layers": 7, "layer_decay_rate": 0.9}},
            ["num_layers=7", "4 layers"],
        ),
        ({"optimizer.type": "AdamWW"}, ["AdamWW", "did you mean 'AdamW'"]),
        ({"optimizer": dict(_delete_=True, type="Adagrad", lr=0.1)}, ["Adagrad cannot be", "RMSprop"]),
        ({"optimizer.type": "Lamb"}, ["Lamb looks at tensors as a whole", "AdamW or SGD"]),
        (
            {"optimizer.type": "PagedAdamW8bit"},
            ["'PagedAdamW8bit' is no optimizer", "'package.module.Class'"],
        ),
        ({"lr_config.power": "x"}, ["lr_config.power='x'"]),
        ({"lr_config.warmup_iters": -1}, ["warmup_iters", "-1"]),
        ({"model.test_cfg.stride": [0, 0]}, ["model.test_cfg.stride=[0, 0]"]),
        (
            {"model.decode_head.in_channels": [128, 128, 128, 33]},
            ["the model cannot take a training image", "in_channels"],
        ),
        (
            {"evaluation.save_best": "1_mIoU"},
            ["save_best='1_mIoU'", "data.val is a single data set", "write save_best='mIoU'"],
        ),
        (
            {
                "evaluation.save_best": "2_mIoU",
                "data.val.img_dir": ["images/validation"] * 2,
                "data.val.ann_dir": ["annotations/validation"] * 2,
            },
            ["save_best='2_mIoU'", "data.val joins 2 data sets, numbered from 0"],
        ),
        ({"optimizer.betas": [0.9]}, ["optimizer AdamW"]),
        ({"model.backbone.num_heads": 0}, ["num_heads=0 must be a whole number of at least 1"]),
        ({"model.backbone.patch_size": 0}, ["patch_size=0 must be a whole number of at least 1"]),
        (
            {"model.backbone": dict(_delete_=True, type="SwinTransformer", num_heads=(3, 0, 12, 24))},
            ["ZeroDivisionError", "of its settings these are 0: model.backbone.num_heads.1"],
        ),
        (
            {"data.train.pipeline.6.std": [58.0, 0.0, 57.0]},
            ["std=[58.0, 0.0, 57.0] of Normalize in the pipeline of data.train", "above 0"],
        ),
        (
            {"data.val.pipeline.1.transforms.3.std": [58.0, -1.0, 57.0]},
            ["of Normalize in the pipeline of data.val", "above 0"],
        ),
        ({"model.backbone.pretrained": 5}, ["pretrained=5"]),
        ({"data.train.pipeline": 5}, ["data.train.pipeline=5"]),
        ({"data.train": 5}, ["data.train", "is 5"]),
        ({"data.val.data_root": 5}, ["data.val.data_root=5"]),
        ({"runner": 3}, ["runner=3"]),
        ({"optimizer": None}, ["optimizer=None"]),
        ({"evaluation": 5}, ["evaluation=5"]),
        ({"log_config.hooks": ["a"]}, ["log_config.hooks"]),
        ({"engine": 5}, ["engine=5"]),
        ({"load_from": 5}, ["load_from", "is 5"]),
        ({"optimizer.momentum": 0.9}, ["AdamW", "momentum"]),
        (
            {"optimizer.weigth_decay": 0.01},
            ["unknown key 'weigth_decay' in optimizer AdamW", "did you mean 'weight_decay'"],
        ),
        ({"optimizer.lr": -1}, ["optimizer.lr=-1"]),
        ({"optimizer.lr": "4e-5x"}, ["optimizer.lr='4e-5x'"]),
        ({"optimizer.constructor": "CustomLayerDecay"}, ["CustomLayerDecay"]),
        ({"optimizer.paramwise_cfg": {"num_layers": 4, "layer_decay_rate": "a"}}, ["layer_decay_rate='a'"]),
        ({"model.test_cfg.stride": None}, ["model.test_cfg.stride=None"]),
        ({"model.test_cfg.mode": "slid"}, ["'slid'", "'whole'"]),
        ({"model.test_cfg.mode": None}, ["model.test_cfg.mode=None", "'whole'"]),
        ({"model.test_cfg.stride": (113, 70)}, ["stride=(113, 70)", "larger than crop_size"]),
        ({"data.val.ann_dir": None}, ["data.val", "no ann_dir"]),
        ({"model.test_cfg.batch_size": 0}, ["model.test_cfg.batch_size=0"]),
        ({"engine.evaluation_weights": "half"}, ["engine.evaluation_weights='half'"]),
        ({"data.train.pipeline.3.crop_size": 112}, ["data.train", "TypeError"]),
        (
            {
                "data.val.type": "CustomDataset",
                "data.val.classes": ("a", "a"),
                "data.val.palette": [[0, 0, 0], [1, 1, 1]],
            },
            ["data.val has several classes called a"],
        ),
        (
            {
                "data.val.type": "CustomDataset",
                "data.val.classes": ("a", "b"),
                "data.val.palette": [[0, 0, 0], [1, 1, 1]],
            },
            ["data.train has 150 classes", "data.val has 2"],
        ),
        ({"data.train.type": "CustomDataset"}, ["data.train", "classes"]),
        ({"data.samples_per_gpu": 3}, ["engine.global_batch=8", "3 images"]),
        ({"data.samples_per_gpu": 0}, ["samples_per_gpu", "is 0"]),
        ({"engine.global_bach": 8}, ["global_bach", "did you mean engine.global_batch"]),
        ({"modle.backbone": 8}, ["modle", "did you mean model"]),
        ({"model.bakbone.depth": 8}, ["bakbone", "did you mean model.backbone"]),
        (
            {"model.decode_head.in_index": [0, 1, 2]},
            ["UPerHead: `assert len(in_channels) == len(in_index)` of", "decode_head.py, line "],
        ),
        (
            {"model.decode_head.loss_decode.class_weight": [1.0] * 149},
            ["model.decode_head.loss_decode", "class_weight of 149", "150 classes"],
        ),
        (
            {"model.auxiliary_head.loss_decode.class_weight": [1.0] * 151},
            ["model.auxiliary_head.loss_decode", "class_weight of 151", "150 classes"],
        ),
        (
            {"model.decode_head.loss_decode": dict(_delete_=True, type="FocalLoss", class_weight=[1.0])},
            ["FocalLoss has class_weight of 1 numbers"],
        ),
        (
            {
                "model.decode_head.loss_decode": dict(
                    _delete_=True, type="CrossEntropyLoss", use_sigmoid=True, class_weight=[1.0] * 150
                )
            },
            ["class_weight with use_sigmoid=True"],
        ),
        (
            {"model.decode_head.ignore_index": 254},
            ["model.decode_head.ignore_index is 254", "ignore_index of data.train is 255"],
        ),
        ({"data.train.ignore_index": 250}, ["ignore_index is 255", "ignore_index of data.train is 250"]),
        (
            {"data.train.pipeline.7.seg_pad_val": 254},
            ["ignore_index is 255", "Pad.seg_pad_val of its pipeline is 254"],
        ),
        (
            {"model.decode_head.loss_decode": dict(_delete_=True, type="DiceLoss", ignore_index=254)},
            ["ignore_index is 255", "that of its DiceLoss is 254"],
        ),
        (
            {"model.decode_head.loss_decode": dict(_delete_=True, type="DiceLoss", loss_name="dice")},
            ["loss_name='dice'", "call it 'loss_dice'"],
        ),
        ({"runner.type": "EpochBasedRunner"}, ["EpochBasedRunner", "max_epochs=..."]),
        ({"lr_config.policy": "step"}, ["lr_config", "step"]),
        ({"lr_config.policy": "OneCycle"}, ["OneCycle", "Poly, "]),
    ],
)
def test_a_wrong_setting_is_one_sentence(options, words, ade20k):
    said = refusal(TINY, options, ade20k)
    assert all(word in said for word in words), said


def test_one_channel_needs_a_sigmoid(ade20k):
    experiment = experiment_of(TINY, ade20k)
    for head in (experiment.model.decode_head, experiment.model.auxiliary_head):
        head.update(num_classes=2, out_channels=1, loss_decode=dict(type="CrossEntropyLoss"))
    two = replace(
        experiment,
        train=ConfigDict(
            experiment.train,
            type="CustomDataset",
            img_suffix=".jpg",
            seg_map_suffix=".png",
            classes=["a", "b"],
        ),
        val=None,
    )
    with pytest.raises(
        ConfigError,
        match=r"model\.decode_head.*CrossEntropyLoss.*use_sigmoid=True",
    ):
        checked(two, validate=False)


def two_classes(ade20k, **head):
    """The experiment with two classes, and a decode head of these settings alone."""
    experiment = experiment_of(TINY, ade20k)
    experiment.model.decode_head.update(num_classes=2, **head)
    experiment.model.auxiliary_head = None
    own = dict(
        type="CustomDataset", img_suffix=".jpg", seg_map_suffix=".png", classes=["a", "b"], ignore_index=255
    )
    return replace(experiment, train=ConfigDict(experiment.train, **own), val=None)


BINARY = dict(out_channels=1, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True))


@pytest.mark.parametrize("threshold", [7, 0, 1.0, "0.5", True])
def test_a_threshold_that_no_sigmoid_can_pass_is_refused(threshold, ade20k):
    with pytest.raises(ConfigError, match=rf"model\.decode_head\.threshold={threshold!r} "):
        checked(two_classes(ade20k, threshold=threshold, **BINARY), validate=False)


def test_a_threshold_of_two_channels_is_a_line():
    built = build_head(dict(type="FCNHead", in_channels=4, channels=4, num_classes=2, threshold=0.9))
    (said,) = check_thresholds(nn.ModuleDict({"decode_head": built}))
    assert said.startswith("model.decode_head.threshold=0.9 has no effect")
    for settings in (
        dict(num_classes=2),
        dict(num_classes=2, out_channels=1, threshold=0.5),
        dict(num_classes=2, out_channels=1),
    ):
        loss = dict(type="CrossEntropyLoss", use_sigmoid=True)
        head = build_head(dict(type="FCNHead", in_channels=4, channels=4, loss_decode=loss, **settings))
        assert check_thresholds(nn.ModuleDict({"decode_head": head})) == []


def test_a_loss_beside_others_that_does_not_count_is_a_line(ade20k):
    experiment = experiment_of(TINY, ade20k)
    experiment.model.decode_head.loss_decode = [
        dict(type="CrossEntropyLoss"),
        dict(type="DiceLoss", loss_name="dice"),
    ]
    warnings = checked(experiment, validate=False).warnings
    assert any("loss_name='dice' has no 'loss' in it" in said for said in warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model.backbone.drop_path_rate": 1.0}, ["drop-path rate of 1", "below 1"]),
        ({"model.train_cfg": None}, ["Mask2FormerHead", "train_cfg", "assigner"]),
        ({"model.train_cfg.num_points": 0}, ["num_points=0 must be a whole number of at least 1"]),
        ({"model.train_cfg.importance_sample_ratio": 1.5}, ["importance_sample_ratio=1.5", "at most 1"]),
        ({"model.decode_head.num_querys": 3}, ["no argument num_querys"]),
        ({"model.decode_head.num_queries": 0}, ["num_queries=0"]),
        (
            {"model.decode_head.num_transformer_feat_level": 4},
            ["num_transformer_feat_level=4", "num_levels", "is 3"],
        ),
        ({"model.decode_head.loss_mask.use_sigmoid": False}, ["loss_mask.use_sigmoid must be True"]),
        ({"model.type": "EncoderDecoder"}, ["model.type='EncoderDecoderMask2Former'"]),
        ({"model.decode_head.num_classes": 19}, ["class_weight has 151", "19 classes"]),
        ({"engine.heads_dtype": "bfloat16"}, ["engine.heads_dtype='bfloat16' is not for Mask2FormerHead"]),
    ],
)
def test_a_wrong_setting_of_mask2former_is_one_sentence(options, words, ade20k):
    said = refusal(MASK2FORMER, options, ade20k)
    assert all(word in said for word in words), said


def test_a_ds_config_without_a_stage_is_refused(ade20k):
    experiment = experiment_of(TINY, ade20k)
    with pytest.raises(ConfigError, match="no ZeRO stage"):
        check(experiment, {"bf16": {"enabled": True}}, World(0, 2, 0))


def test_a_batch_norm_over_one_value_is_refused_before_it_fails(ade20k):
    experiment = read_experiment(
        ROOT / TINY,
        dict(option.split("=") for option in data_options(ade20k))
        | {"data.samples_per_gpu": 1, "engine.global_batch": None},
    )
    checked(experiment)  # two processes have two values
    with pytest.raises(ConfigError, match=r"decode_head\.psp_modules.*data\.samples_per_gpu"):
        check(experiment, ROOT / "ds_configs/zero3_bf16.json", World(0, 1, 0))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_work_directory_that_cannot_be_made_is_refused(name, ade20k, tmp_path):
    from internseg_ds.output_files import check_writable

    (tmp_path / "file").write_text("precious")
    check_writable(tmp_path / "new" / "one", "--work-dir")
    with pytest.raises(ConfigError, match=r"--work-dir .* cannot be written"):
        check_writable(tmp_path / name, "--work-dir")


def test_an_option_without_a_value_is_a_usage_error(launch):
    done = launch(
        "launch/train.py", TINY, "--cfg-options", "model.backbone.depth", launcher="python", check=False
    )
    assert done.returncode == 2 and "write KEY=VALUE" in done.stderr and "Traceback" not in done.stderr
    done = launch("launch/train.py", TINY, "--load-from", "", launcher="python", check=False)
    assert done.returncode == 2 and "--load-from: is empty" in done.stderr


def test_a_dry_run_prints_parameters_groups_and_memory_and_writes_nothing(launch, ade20k, tmp_path):
    done = launch(
        "launch/train.py",
        TINY,
        "--dry-run",
        "--work-dir",
        tmp_path / "work",
        "--cfg-options",
        *data_options(ade20k),
        processes=1,
        launcher="python",
    )
    assert all(
        word in done.stdout
        for word in ("backbone", "layer 0, decay", "optimizer", "weights: random", "8 images per step")
    )
    assert not (tmp_path / "work").exists()


def test_a_run_does_not_go_on_with_its_classes_in_another_order(trained, ade20k):
    options = dict(option.split("=", 1) for option in (*SMALL, *data_options(ade20k)))
    experiment = read_experiment(
        ROOT / TINY, {key: DictAction._parse_iterable(value) for key, value in options.items()}
    )
    names = build_dataset(experiment.train).CLASSES
    swapped = replace(
        experiment, train=ConfigDict(experiment.train, classes=[names[1], names[0], *names[2:]])
    )
    save = trained.work_dir / "checkpoints" / "iter_12"
    with pytest.raises(
        CheckpointError,
        match=r"iter_12.*class 0.*'wall'.*'building'",
    ):
        plan = check(
            swapped, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False, resume_from=save
        )
        compare_with_checkpoint(plan)


@pytest.mark.parametrize(
    ("kind", "kept"), [("NAdam", "exp_avg, exp_avg_sq, step, mu_product"), ("SGD", "nothing")]
)
def test_a_checkpoint_of_another_optimizer_is_refused(kind, kept, trained, ade20k):
    options = dict(option.split("=", 1) for option in (*SMALL, *data_options(ade20k)))
    experiment = read_experiment(
        ROOT / TINY, {key: DictAction._parse_iterable(value) for key, value in options.items()}
    )
    other = replace(experiment, optimizer={"type": kind, "lr": 1e-3})
    save = trained.work_dir / "checkpoints" / "iter_12"
    with pytest.raises(CheckpointError, match=rf"iter_12.*exp_avg.*'{kind}'.*{kept};"):
        plan = check(
            other, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=False, resume_from=save
        )
        compare_with_checkpoint(plan)


def test_a_truncated_checkpoint_is_refused_before_training(trained, launch, ade20k, tmp_path):
    import shutil

    copy = tmp_path / "iter_12"
    shutil.copytree(trained.work_dir / "checkpoints" / "iter_12", copy)
    shard = next(copy.glob("*rank_1*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:1000])
    done = launch("launch/consolidate.py", copy, tmp_path / "out.pth", processes=1, check=False)
    assert done.returncode == 2 and shard.name in done.stderr and "truncated" in done.stderr
    assert not list(tmp_path.glob("out*"))
    assert json.loads((copy / "internseg_ds.json").read_text())["step"] == 12
