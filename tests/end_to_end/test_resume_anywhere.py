"""A run saved by 2 processes under one ds_config goes on under another, and with other numbers of processes,
along the curve of the unbroken run."""

import ast
import json
import shutil

import pytest
from mmseg.datasets import build_dataset

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import CheckpointError
from internseg_ds.preflight.preflight import check
from internseg_ds.training.resume.find_checkpoint import compare_with_checkpoint
from tests.conftest import ROOT, TINY, data_options
from tests.end_to_end.conftest import NO_NOISE, SMALL

STEPS = [*NO_NOISE, "runner.max_iters=10", "checkpoint_config.interval=5", "lr_config.warmup_iters=3"]


@pytest.fixture(scope="module")
def unbroken(train):
    """10 steps under ZeRO-3 with an average of the weights, saved at step 5."""
    return train(
        "--deepspeed_config",
        "ds_configs/zero3_bf16.json",
        "--no-validate",
        options=[*STEPS, "engine.ema=0.9"],
    )


def resumed(train, unbroken, *arguments, **settings):
    run = train(
        "--resume", unbroken.work_dir / "checkpoints" / "iter_5", "--no-validate", *arguments, **settings
    )
    assert list(run.losses) == [6, 7, 8, 9, 10]
    return run


@pytest.mark.parametrize(
    ("name", "processes", "micro_batch", "states"),
    [
        ("zero3_bf16", 1, 4, "fp32"),
        pytest.param("zero3_bf16", 4, 1, "fp32", marks=pytest.mark.slow),
        ("zero1_bf16", 2, 2, "fp32"),
        pytest.param("zero3_autocast", 2, 2, "fp32", marks=pytest.mark.slow),
        pytest.param("zero3_bf16_offload_optimizer", 2, 2, "fp32", marks=pytest.mark.slow),
        pytest.param("zero3_bf16", 2, 2, "8bit", marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_along_the_same_curve(name, processes, micro_batch, states, train, unbroken):
    run = resumed(
        train,
        unbroken,
        "--deepspeed_config",
        f"ds_configs/{name}.json",
        processes=processes,
        options=[
            *STEPS,
            "engine.ema=0.9",
            f"data.samples_per_gpu={micro_batch}",
            f"engine.optimizer_states={states}",
        ],
    )
    expected = {step: loss for step, loss in unbroken.losses.items() if step > 5}
    assert run.losses == pytest.approx(expected, rel=1e-2)
    rates = [
        {record["step"]: record["lr"] for record in each.records if "loss" in record}
        for each in (run, unbroken)
    ]
    assert rates[0] == pytest.approx({step: rate for step, rate in rates[1].items() if step > 5})
    then, now = ZeroCheckpoint.open(unbroken.work_dir), ZeroCheckpoint.open(run.work_dir)
    # 5 steps of at most lr each, of which the signs of a few tiny gradients may differ
    for what in ("fp32", "ema"):
        for parameter in ("backbone.blocks.1.attn.qkv.weight", "decode_head.conv_seg.weight"):
            numel = then.shapes[parameter].numel()
            difference = (
                then.read_slice(parameter, 0, numel, what) - now.read_slice(parameter, 0, numel, what)
            ).abs()
            assert float(difference.mean()) < 2e-4, (what, parameter)


def test_a_checkpoint_of_plain_deepspeed_goes_on_too(train, unbroken, tmp_path):
    save = tmp_path / "global_step5"
    shutil.copytree(unbroken.work_dir / "checkpoints" / "iter_5", save)
    (save / "internseg_ds.json").unlink()
    (tmp_path / "latest").write_text("global_step5")
    run = train("--resume", tmp_path, "--no-validate", options=[*STEPS, "engine.ema=0.9"])
    assert run.losses == {step: loss for step, loss in unbroken.losses.items() if step > 5}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.backbone.mlp_ratio=2"], ["does not fit the model", "mlp.fc1"]),
        (["model.backbone.freeze_vit=True"], ["trained backbone", "freezes it"]),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(options, words, train, unbroken):
    run = train(
        "--resume", unbroken.work_dir, "--no-validate", options=[*STEPS, *options], processes=1, check=False
    )
    assert (
        run.returncode == 2 and "Traceback" not in run.output and all(word in run.output for word in words)
    ), run.output[-2000:]


def test_other_learning_rates_are_told_and_used(train, unbroken):
    run = train(
        "--resume",
        unbroken.work_dir / "checkpoints" / "iter_5",
        "--no-validate",
        options=[*STEPS, "optimizer.paramwise_cfg.layer_decay_rate=0.01"],
    )
    assert "weight decay for backbone." in run.output and "layer_decay_rate" in run.output
    saves = [
        ZeroCheckpoint(unbroken.work_dir / "checkpoints" / "iter_5"),
        ZeroCheckpoint.open(unbroken.work_dir),
        ZeroCheckpoint.open(run.work_dir),
    ]

    def moved(parameter: str) -> list[float]:
        """Mean change of a parameter from step 5 to 10: of the unbroken run, and of the one with other
        rates."""
        before, unchanged, changed = (
            save.read_slice(parameter, 0, save.shapes[parameter].numel(), "fp32") for save in saves
        )
        return [float((after - before).abs().mean()) for after in (unchanged, changed)]

    unchanged, changed = moved("backbone.blocks.0.attn.qkv.weight")
    assert 0 < changed < 0.05 * unchanged
    unchanged, changed = moved("decode_head.conv_seg.weight")
    assert changed == pytest.approx(unchanged, rel=0.2)


def test_other_settings_are_told_and_other_classes_refused(unbroken, train, ade20k):
    run = train(
        "--resume",
        unbroken.work_dir,
        "--no-validate",
        "--dry-run",
        options=[*STEPS, "optimizer.betas=(0.9,0.95)", "runner.max_iters=12"],
        processes=1,
    )
    for line in ("optimizer.betas (0.9, 0.999) -> (0.9, 0.95)", "runner.max_iters 10 -> 12"):
        assert f"the checkpoint's run had another setting: {line}" in run.output, run.output[-2000:]
    settings = dict(option.split("=", 1) for option in [*SMALL, *STEPS])
    experiment = read_experiment(
        ROOT / TINY,
        {key: ast.literal_eval(value) for key, value in settings.items()}
        | dict(option.split("=", 1) for option in data_options(ade20k)),
    )
    names = build_dataset(experiment.train).CLASSES
    experiment.train["classes"] = [names[1], names[0], *names[2:]]
    with pytest.raises(CheckpointError, match=f"class 0.*'{names[0]}'.*'{names[1]}'"):
        compare_with_checkpoint(
            check(
                experiment,
                ROOT / "ds_configs/zero3_bf16.json",
                World(0, 2, 0),
                validate=False,
                resume_from=unbroken.work_dir / "checkpoints" / "iter_5",
            )
        )


def test_the_average_is_scored_and_consolidated(unbroken, launch, ade20k, tmp_path):
    launch("launch/consolidate.py", unbroken.work_dir, tmp_path / "ema.pth", "--ema", processes=1)
    scores = []
    for number, arguments in enumerate(
        ([unbroken.work_dir, "--ema"], [tmp_path / "ema.pth"], [unbroken.work_dir])
    ):
        out = tmp_path / str(number)
        launch(
            "launch/test.py",
            TINY,
            *arguments,
            "--out",
            out,
            "--cfg-options",
            *SMALL,
            *data_options(ade20k),
            processes=1,
        )
        scores.append(json.loads((out / "results.json").read_text()))
    assert scores[0] == scores[1] != scores[2]
