import gc
import re
import sys
from pathlib import Path

import pytest
from mmcv import Config

from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import ConfigError
from tests.conftest import ROOT, TINY

PUBLISHED_STYLE = dict(
    deepspeed=False,
    deepspeed_config="zero_configs/adam_zero1_bf16.json",
    dist_params=dict(backend="nccl"),
    workflow=[("train", 1)],
    log_level="INFO",
    cudnn_benchmark=True,
    custom_hooks=[dict(type="ToBFloat16Hook", priority=49)],
    load_from=None,
    resume_from=None,
    optimizer_config=dict(grad_clip=dict(max_norm=0.1, norm_type=2)),
    helper_variable=7,
    log_config=dict(
        interval=50, hooks=[dict(type="TextLoggerHook", by_epoch=False), dict(type="SomebodysHook")]
    ),
    checkpoint_config=dict(deepspeed=False, by_epoch=False, interval=1000, max_keep_ckpts=2),
    evaluation=dict(interval=500, metric="mIoU", save_best="auto"),
)


def test_keys_of_mmcvs_runner_are_interpreted_or_answered_by_a_line():
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict(PUBLISHED_STYLE)
    experiment = read_experiment(cfg)
    assert (
        experiment.checkpoints.interval,
        experiment.checkpoints.max_keep,
        experiment.evaluation.interval,
        experiment.logging.interval,
    ) == (1000, 2, 500, 50)
    assert (
        experiment.gradient.clipping == 0.1
        and experiment.evaluation.best_by == "mIoU"
        and experiment.evaluation.metrics == ("mIoU",)
    )
    for word in ("deepspeed_config", "ToBFloat16Hook", "dist_params", "workflow", "SomebodysHook"):
        assert any(word in note for note in experiment.notes), word
    assert any("checkpoint_config.deepspeed has no effect" in note for note in experiment.notes)
    assert experiment.cudnn_benchmark and experiment.logging.level == "INFO"
    assert not any("helper_variable" in note for note in experiment.notes)


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    """A config is a program, and may compute its numbers."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        f"""_base_ = ["{ROOT / TINY}"]
import numpy as np
optimizer = dict(lr=np.float32(0.5), betas=(np.float64(0.25), 0.5))
runner = dict(max_iters=np.int64(7))
"""
    )
    found = read_experiment(mine)
    assert type(found.optimizer.lr) is float and found.optimizer.lr == 0.5 and found.schedule.max_steps == 7
    assert type(found.optimizer.betas) is tuple and type(found.optimizer.betas[0]) is float


def _with(**sections) -> Config:
    """The demo's config with keys merged into its sections."""
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict(sections)
    return cfg


def test_work_dir_seed_and_auto_resume_are_read():
    experiment = read_experiment(_with(work_dir="somewhere/else", seed=7, auto_resume=True))
    assert (str(experiment.work_dir), experiment.seed, experiment.resume_from) == (
        "somewhere/else",
        7,
        "auto",
    )
    assert (
        read_experiment(_with(auto_resume=True, resume_from="runs/checkpoints")).resume_from
        == "runs/checkpoints"
    )
    plain = read_experiment(ROOT / TINY)
    assert (str(plain.work_dir), plain.seed, plain.resume_from) == (f"work_dirs/{plain.name}", 0, None)
    assert read_experiment(ROOT / TINY, {"seed": 3, "work_dir": "there"}).seed == 3


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"samples_per_gpus": 4}}, "'samples_per_gpus' in data .*did you mean 'samples_per_gpu'"),
        (
            {"data": {"train_dataloader": {"samples_per_gpus": 4}}},
            "'samples_per_gpus' in data.train_dataloader .*did you mean 'samples_per_gpu'",
        ),
        (
            {"data": {"train_dataloader": {"batch_size": 4}}},
            "'batch_size' in data.train_dataloader .*did you mean 'samples_per_gpu'",
        ),
        ({"data": {"train_dataloader": 4}}, "data.train_dataloader=4 .* must be a section"),
        ({"evaluation": {"intervall": 4}}, "'intervall' in evaluation .*did you mean 'interval'"),
        ({"runner": {"max_iter": 4}}, "'max_iter' in runner .*did you mean 'max_iters'"),
        ({"lr_config": {"min_lrs": 4}}, "'min_lrs' in lr_config .*did you mean 'min_lr'"),
        ({"optimizer_config": {"gradclip": 4}}, "'gradclip' in optimizer_config .*did you mean 'grad_clip'"),
        (
            {"checkpoint_config": {"max_keep_ckpt": 4}},
            "'max_keep_ckpt' in checkpoint_config .*did you mean 'max_keep_ckpts'",
        ),
        (
            {"model": {"test_cfg": {"batch_sizes": 4}}},
            "'batch_sizes' in model.test_cfg .*did you mean 'batch_size'",
        ),
        ({"log_config": {"intervals": 4}}, "'intervals' in log_config .*did you mean 'interval'"),
        (
            {"log_config": {"hooks": [dict(type="TensorboardLoggerHook", log_dirs="x")]}},
            "'log_dirs' in TensorboardLoggerHook .*did you mean 'log_dir'",
        ),
        (
            {"log_config": {"hooks": [dict(type="TensorBoardLoggerHook")]}},
            "did you mean 'TensorboardLoggerHook'",
        ),
    ],
)
def test_a_misspelt_key_of_a_section_is_an_error(sections, words):
    with pytest.raises(ConfigError, match=words):
        read_experiment(_with(**sections))


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (
            {"data": {"train_dataloader": {"shuffle": False, "drop_last": False}}},
            "data.train_dataloader.shuffle has no effect here: training images are always",
        ),
        ({"data": {"persistent_workers": True}}, "data.persistent_workers has no effect"),
        ({"data": {"val_dataloader": {"samples_per_gpu": 4}}}, "data.val_dataloader has no effect"),
        ({"evaluation": {"gpu_collect": True}}, "evaluation.gpu_collect has no effect"),
        ({"evaluation": {"start": 3}}, "evaluation.start has no effect"),
        ({"evaluation": {"imgfile_prefix": "x"}}, "evaluation.imgfile_prefix has no effect"),
        (
            {"optimizer_config": {"type": "Fp16OptimizerHook", "loss_scale": 512.0}},
            "optimizer_config.loss_scale has no effect",
        ),
        (
            {"optimizer_config": {"type": "SomebodysOptimizerHook", "update_interval": 1}},
            "optimizer_config.update_interval has no effect",
        ),
        ({"checkpoint_config": {"save_optimizer": False}}, "checkpoint_config.save_optimizer has no effect"),
        ({"log_config": {"verbosely": True}}, "log_config.verbosely has no effect"),
        (
            {"log_config": {"hooks": [dict(type="MMSegWandbHook", commit=False)]}},
            "MMSegWandbHook.commit has no effect here",
        ),
        (
            {"log_config": {"hooks": [dict(type="TextLoggerHook", interval=7)]}},
            "TextLoggerHook.interval has no effect",
        ),
        (
            {"custom_hooks": [dict(type="EMAHook", momentum=0.001)]},
            "an average of the weights (EMAHook) is engine.ema",
        ),
        ({"fp16": {}}, "fp16 = {} has no effect"),
        ({"opencv_num_threads": 0}, "opencv_num_threads = 0 has no effect"),
    ],
)
def test_a_key_that_mmcv_or_mmseg_know_is_a_line(sections, line):
    assert any(line in note for note in read_experiment(_with(**sections)).notes)


def test_a_key_at_the_top_that_is_nearly_one_that_is_read_is_a_warning():
    said = read_experiment(_with(evalution=dict(interval=3), norm_layer=1)).warnings
    (line,) = said
    assert re.search(rf"^evalution of {ROOT / TINY} .* evaluation\?$", line)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_config.warmup": None}, ["warmup_iters=", "warms nothing up"]),
        (
            {"lr_config.warmup_iters": 420},
            ["warmup_iters=420", "not shorter than all of the training (420 steps)"],
        ),
        ({"optimizer.lr": 0}, ["optimizer.lr=0", "no weight changes"]),
        ({"lr_config.min_lr": 1.0}, ["min_lr=1", "is above optimizer.lr"]),
    ],
)
def test_an_odd_schedule_is_a_warning(options, words):
    (said,) = read_experiment(ROOT / TINY, options).warnings
    assert all(word in said for word in words), said


def test_a_fixed_rate_need_not_say_what_is_counted(tmp_path):
    config = tmp_path / "fixed.py"
    config.write_text(
        f"_base_ = {str(ROOT / TINY)!r}\nlr_config = dict(_delete_=True, policy='fixed')\ntotal_iters = 77\n"
    )
    experiment = read_experiment(config)
    assert experiment.schedule.lr(100, 0.5) == 0.5 and experiment.max_steps == 420
    assert any("total_iters = 77 has no effect: runner.max_iters = 420" in note for note in experiment.notes)


def test_defaults_are_what_mmseg_users_expect():
    cfg = Config.fromfile(ROOT / TINY)
    for key in ("checkpoint_config", "evaluation", "log_config", "engine", "optimizer_config"):
        cfg.pop(key)
    experiment = read_experiment(cfg)
    assert (
        experiment.engine.global_batch is None
        and experiment.gradient.clipping == 0.0
        and experiment.evaluation.best_by is None
    )
    assert experiment.checkpoints.interval == experiment.evaluation.interval == experiment.max_steps == 420


@pytest.mark.parametrize(
    ("save_best", "best_by"),
    [("auto", "mIoU"), ("mAcc", "mAcc"), ("1_mIoU", "1_mIoU"), (True, "mIoU"), (False, None), (None, None)],
)
def test_save_best_names_the_score(save_best, best_by):
    assert read_experiment(ROOT / TINY, {"evaluation.save_best": save_best}).evaluation.best_by == best_by


def test_cumulative_iters_is_accumulation():
    cfg = Config.fromfile(ROOT / TINY)
    cfg.pop("engine")
    assert read_experiment(cfg, {"optimizer_config.cumulative_iters": 4}).gradient.accumulation == 4


def test_options_reach_arguments_that_the_file_leaves_at_their_defaults():
    experiment = read_experiment(
        ROOT / TINY,
        {
            "data.train.max_image_num": 5,
            "model.backbone.with_final_norm": True,
            "engine.backbone_dtype": "float32",
            "data.train.pipeline.0.to_float32": True,
        },
    )
    assert experiment.train.max_image_num == 5 and experiment.model.backbone.with_final_norm
    assert experiment.engine.backbone_dtype == "float32" and experiment.train.pipeline[0].to_float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimzer.lr": 1}, "did you mean optimizer"),
        ({"data.trian.data_root": 1}, "did you mean data.train"),
        ({"engine.backbone_dtype": "float16"}, "float16"),
        ({"engine.compile": "inductor"}, "compile='inductor' must be True or False"),
        ({"engine.matmul_dtype": "fp8"}, "matmul_dtype='fp8' is none of 'bfloat16', 'float8'"),
        ({"engine.heads_dtype": "auto"}, "heads_dtype=.auto. is none of"),
        ({"engine.accumulate": 1}, "accumulate"),
        ({"data.train.pipeline.99.type": "x"}, "99"),
        (
            {"model.backbone.out_indices.0": 1},
            r"one element of a list cannot be set; write all of them, model.backbone.out_indices=\[",
        ),
        ({"optimizer.betas.0": 0.8}, "one element of a list"),
        ({"load_from": ""}, "load_from of .* must be a path"),
        ({"crop_size": (64, 64)}, "crop_size is a variable of .*, which its sections have taken already"),
        ({"data.train.type": "ConcatDataset"}, r"ConcatDataset of the config needs datasets=\[dict"),
        ({"runner.max_iters": 0}, "at least 1"),
        ({"runner.max_iters": True}, "at least 1"),
        ({"optimizer_config.grad_clip.max_norm": "x"}, "max_norm must be a number"),
        ({"optimizer_config.grad_clip.max_norms": 1.0}, "did you mean optimizer_config.grad_clip.max_norm"),
        ({"sed": 3}, "did you mean seed"),
        ({"seed": -1}, "seed of .* is -1"),
        ({"work_dir": 5}, "work_dir of .* must be a path"),
        ({"runner.max_iter": 10}, "did you mean runner.max_iters"),
        ({"data.sample_per_gpu": 8}, "did you mean data.samples_per_gpu"),
        ({"evaluation.intervall": 5}, "did you mean evaluation.interval"),
        ({"lr_config.warmup_iter": 3}, "did you mean lr_config.warmup_iters"),
        ({"model.test_cfg.strid": (3, 3)}, "did you mean model.test_cfg.stride"),
        ({"evaluation.metric": "mIou"}, "mIoU, mDice"),
        ({"evaluation.metric": []}, "names no metric"),
        ({"data.train": []}, "data.train of .* is an empty list"),
        ({"evaluation.save_best": "1_mDice"}, "save_best='1_mDice'"),
        ({"evaluation.save_best": "mDice"}, "save_best='mDice'.*mIoU, mAcc, aAcc"),
        ({"evaluation.interval": "x"}, "evaluation.interval.*'x'"),
        ({"checkpoint_config.interval": 2.5}, "checkpoint_config.interval.*2.5"),
        ({"data.workers_per_gpu": -1}, "workers_per_gpu.*-1"),
        ({"log_level": "LOUD"}, "LOUD"),
        ({"lr_config.warmup": "cosine"}, "linear"),
    ],
)
def test_options_that_mean_nothing_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        read_experiment(ROOT / TINY, options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = dict(", "cannot be read"),
        ("x = 1", "no 'model' section; take one"),
        ("modl = dict()", "no 'model' section; is 'modl' meant to be it"),
        (
            "model = dict()\noptim_wrapper = dict()",
            "optim_wrapper it looks like a config of MMSegmentation 1.x",
        ),
    ],
)
def test_a_broken_config_is_one_sentence(tmp_path, text, words):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_experiment(tmp_path / "broken.py")


def test_a_missing_config_names_the_nearest():
    with pytest.raises(ConfigError, match=rf"did you mean {TINY}\?"):
        read_experiment(TINY.replace("112", "113"))


def test_total_iters_of_old_configs_is_the_number_of_steps(tmp_path):
    cfg = Config.fromfile(ROOT / TINY)
    cfg._cfg_dict.pop("runner")
    cfg.total_iters = 77
    assert read_experiment(cfg).max_steps == 77


def test_a_missing_config_that_is_like_none_names_none():
    with pytest.raises(ConfigError, match=rf"mine/experiment\.py.*{Path.cwd()}"):
        read_experiment("mine/experiment.py")


def test_a_missing_config_may_have_its_like_beside_it(tmp_path):
    (tmp_path / "upernet_mine.py").touch()
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/upernet_mine\.py\?"):
        read_experiment(tmp_path / "upernet_mien.py")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "no_such_module_at_all",
            "'no_such_module_at_all' cannot be imported: .*No module named 'no_such_module_at_all'.* on "
            "PYTHONPATH",
        ),
        (
            "internseg_ds.engine.segmentor_engine",
            "'internseg_ds.engine.segmentor_engine' cannot .*; leave it out, for internseg_ds registers all of its "
            "own by itself; the nearest module that there is: internseg_ds.training.segmentor_engine$",
        ),
        (
            "internseg_ds.models.internvit.intern_vit_6",
            "leave it out, .* the nearest module that there is: internseg_ds.models.intern_vit.intern_vit_6b$",
        ),
        (
            "backbone_of_a_name_that_is_taken",
            "'backbone_of_a_name_that_is_taken' cannot .*already registered in models.* rename yours, or "
            "register it with force=True",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(module, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "backbone_of_a_name_that_is_taken.py").write_text(
        "from mmseg.models import BACKBONES\n@BACKBONES.register_module()\nclass InternViT6B:\n    pass\n"
    )
    (tmp_path / "config.py").write_text(
        f"_base_ = {str(ROOT / TINY)!r}\ncustom_imports = dict(imports=['os', {module!r}], "
        "allow_failed_imports=False)"
    )
    with pytest.raises(ConfigError, match=f"custom_imports of .*config.py: .*{words}"):
        read_experiment(tmp_path / "config.py")


def test_the_module_of_a_transform_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_that_a_config_imports.py").write_text("")
    (tmp_path / "config.py").write_text(
        f"_base_ = {str(ROOT / TINY)!r}\ncustom_imports = dict(imports='module_that_a_config_imports')"
    )
    read_experiment(tmp_path / "config.py")
    assert sys.modules.pop("module_that_a_config_imports").__file__ == str(
        tmp_path / "module_that_a_config_imports.py"
    )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(grad_clip=dict(max_norms=0.1)), "did you mean 'max_norm'"),
        (dict(grad_clip=dict(clip_value=1.0)), "unknown key 'clip_value'"),
        (dict(grad_clip=dict(max_norm=float("nan"))), "max_norm must be a number of at least 0"),
        (dict(cumulative_iters=2.5), "cumulative_iters.*2.5.*whole number"),
        (dict(cumulative_iters=0), "cumulative_iters.* 0"),
    ],
)
def test_clipping_and_accumulation_that_mean_nothing_are_named(section, words):
    cfg = Config.fromfile(ROOT / TINY)
    cfg.engine.pop("global_batch", None)
    cfg.optimizer_config = section
    with pytest.raises(ConfigError, match=words):
        read_experiment(cfg)


def test_a_run_that_counts_epochs_has_steps_once_its_data_are_known(tmp_path):
    config = tmp_path / "epochs.py"
    config.write_text(
        f"_base_ = {str(ROOT / TINY)!r}\n"
        "runner = dict(_delete_=True, type='EpochBasedRunner', max_epochs=30)\n"
        "lr_config = dict(_delete_=True, policy='step', step=[20])\n"
        "evaluation = dict(interval=5)\n"
        "checkpoint_config = dict(by_epoch=False, interval=7)\n"
    )
    read = read_experiment(config)
    assert read.counts_epochs and read.in_steps(11).in_steps(13).max_steps == 330
    experiment = read.in_steps(11)
    assert (experiment.evaluation.interval, experiment.checkpoints.interval) == (55, 7)
    assert experiment.schedule.lr(219, 1.0) == 1.0 and experiment.schedule.lr(220, 1.0) == pytest.approx(0.1)
    assert read_experiment(ROOT / TINY).in_steps(11).max_steps == 420


def test_a_warmup_that_outlasts_the_epochs_of_a_run_is_a_warning(tmp_path):
    config = tmp_path / "epochs.py"
    config.write_text(
        f"_base_ = {str(ROOT / TINY)!r}\n"
        "runner = dict(_delete_=True, type='EpochBasedRunner', max_epochs=3)\n"
        "lr_config = dict(_delete_=True, policy='step', step=[2], warmup='linear', warmup_iters=40)\n"
    )
    assert not any("warmup_iters=40" in warning for warning in read_experiment(config).warnings)
    assert any("not shorter than all" in warning for warning in read_experiment(config).in_steps(10).warnings)
    assert not any(
        "not shorter than all" in warning for warning in read_experiment(config).in_steps(20).warnings
    )
    without = {"lr_config": dict(_delete_=True, policy="step", step=[2], warmup_by_epoch=True)}
    assert read_experiment(config, without).in_steps(20).max_steps == 60


def test_settings_of_lora_can_be_added_one_by_one():
    options = {
        "engine.tune.lora.rank": 4,
        "engine.tune.lora.targets": ["qkv"],
        "engine.tune.lora.dropout": 0.1,
    }
    lora = read_experiment(ROOT / TINY, options).engine.tune
    assert (lora.rank, lora.targets, lora.dropout) == (4, ("qkv",), 0.1)
    with pytest.raises(ConfigError, match=r"did you mean engine\.tune\.lora\.targets"):
        read_experiment(ROOT / TINY, {"engine.tune.lora.rank": 4, "engine.tune.lora.target": ["qkv"]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runner.max_epochs": 3}, r"max_iters=\d+ and max_epochs=3, and a run has one length"),
        ({"lr_config.power": float("nan")}, "lr_config.power=nan"),
        ({"lr_config.min_lr": float("inf")}, "lr_config.min_lr=inf"),
        ({"lr_config.warmup_iters": 1.5}, "lr_config.warmup_iters .* is 1.5; it must be a whole number"),
        ({"evaluation.by_epoch": "no"}, "evaluation.by_epoch='no' .* must be True or False"),
        ({"auto_resume": "no"}, "auto_resume='no' .* must be True or False"),
    ],
    ids=str,
)
def test_what_is_no_length_no_rate_and_no_flag_is_an_error(options, words):
    with pytest.raises(ConfigError, match=words):
        read_experiment(ROOT / TINY, options)


def test_two_lengths_of_an_old_config_are_an_error():
    cfg = Config.fromfile(ROOT / TINY)
    cfg._cfg_dict.pop("runner")
    cfg.merge_from_dict({"total_iters": 5, "total_epochs": 2})
    with pytest.raises(ConfigError, match="total_iters=5 and total_epochs=2"):
        read_experiment(cfg)


def test_a_config_that_raises_leaves_nothing_for_python_to_complain_of(tmp_path, monkeypatch):
    config, unraisable = tmp_path / "config.py", []
    config.write_text("number = nowhere + 1")
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(ConfigError, match="NameError: name 'nowhere' is not defined"):
        read_experiment(config)
    gc.collect()
    assert not unraisable
