"""What a training run must be: the same curve as plain PyTorch, under every ds_config, under every launcher,
and after a resume."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.loading import training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.optimization.parameter_groups import parameter_groups
from tests.conftest import ROOT, TINY, data_options, free_port
from tests.end_to_end.conftest import LONG, SMALL, SMALLER, STEPS

DS_CONFIGS = [
    "zero1_bf16",
    "zero2_bf16",
    "zero3_bf16",
    "zero3_bf16_offload_optimizer",
    "zero3_bf16_offload_all",
    "zero3_autocast",
]


@pytest.fixture(scope="module")
def reference(ade20k) -> dict[int, float]:
    return plain_losses(ade20k, STEPS)


def plain_losses(
    ade20k: Path,
    steps: int,
    *more_options: str,
    config: str = TINY,
    micro_batch: int = 4,
    accumulation: int = 1,
    clip: float | None = None,
) -> dict[int, float]:
    """Loss per step of the same model and batches in one plain fp32 process: torch autograd,
    torch.optim.AdamW, no DeepSpeed."""
    from mmcv import DictAction

    options = dict(
        option.split("=", 1) for option in [*SMALLER[config], *LONG, *data_options(ade20k), *more_options]
    )
    options = {key: DictAction._parse_iterable(value) for key, value in options.items()}
    experiment = read_experiment(ROOT / config, options)
    ds = resolve_ds_config(
        {}, experiment="", micro_batch=micro_batch, world_size=1, optimizer=experiment.optimizer
    )
    model = build_for_training(experiment.model, ds, torch.device("cpu"), seed=0).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, experiment.optimizer), lr=1.0, betas=(0.9, 0.999))
    bases = [group["lr"] for group in optimizer.param_groups]
    dataset = build_datasets(experiment.train, "data.train")
    batches = training_batches(
        dataset, GlobalBatchSampler(len(dataset), micro_batch), workers=0, seed=0, device=torch.device("cpu")
    )
    losses = {}
    for step in range(steps):
        for group, base in zip(optimizer.param_groups, bases):
            group["lr"] = experiment.schedule.lr(step, base)
        optimizer.zero_grad()
        losses[step + 1] = 0.0
        for batch in islice(batches, accumulation):
            terms = model(return_loss=True, **batch.inputs)
            loss = sum(value for name, value in terms.items() if "loss" in name) / accumulation
            loss.backward()
            losses[step + 1] += float(loss)
        if clip is not None:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip  # it does clip
        optimizer.step()
    return losses


def test_fp32_zero3_on_2_ranks_follows_plain_pytorch_within_1e_4(train, reference, fp32):
    losses = train("--deepspeed_config", fp32, "--no-validate", options=LONG).losses
    assert losses == pytest.approx(reference, abs=1e-4)


def test_accumulated_and_clipped_gradients_follow_plain_pytorch_within_1e_4(train, ade20k, fp32):
    options = [
        *LONG,
        "runner.max_iters=8",
        "data.samples_per_gpu=1",
        "optimizer_config.grad_clip.max_norm=0.5",
    ]
    losses = train("--deepspeed_config", fp32, "--no-validate", options=options).losses
    assert losses == pytest.approx(
        plain_losses(ade20k, 8, "runner.max_iters=8", micro_batch=2, accumulation=2, clip=0.5), abs=1e-4
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("zero3_bf16_offload_optimizer", "zero2_bf16")
        else name
        for name in DS_CONFIGS
    ],
)
def test_every_ds_config_follows_plain_pytorch_within_bf16(name, long_run, reference):
    losses = long_run(name).losses
    assert list(losses) == list(reference)
    assert losses == pytest.approx(reference, rel=2e-2)
    # it really is another arithmetic
    assert losses != pytest.approx(reference, rel=1e-7) or name == "zero3_autocast"


@pytest.mark.parametrize("name", ["zero3_bf16", pytest.param("zero3_autocast", marks=pytest.mark.slow)])
def test_a_bf16_backbone_follows_plain_pytorch_too(name, train, reference):
    """This machine may compute the backbone in fp32 by default; here the bf16 arithmetic of a GPU is asked
    for."""
    losses = train(
        "--deepspeed_config",
        f"ds_configs/{name}.json",
        "--no-validate",
        options=[*LONG, "runner.max_iters=6", "engine.backbone_dtype=bfloat16"],
    ).losses
    first = {step: reference[step] for step in range(1, 6)}
    assert {step: losses[step] for step in first} == pytest.approx(first, rel=2e-2)
    # it really is another arithmetic
    assert {step: losses[step] for step in first} != pytest.approx(first, rel=1e-6)


def test_a_resumed_run_has_the_same_losses_to_the_last_bit(train, trained):
    """The run stopped inside an epoch, after a save and before its evaluation: the score is made up for."""
    from internseg_ds.checkpoints.manifest import update_metrics

    def stopped(work_dir):
        shutil.copytree(trained.work_dir / "checkpoints" / "iter_6", work_dir / "checkpoints" / "iter_6")
        (work_dir / "checkpoints" / "latest").write_text("iter_6")
        update_metrics(work_dir / "checkpoints" / "iter_6", {})

    resumed = train(
        "--auto-resume",
        options=["runner.max_iters=12", "checkpoint_config.interval=6", "evaluation.interval=6"],
        prepare=stopped,
    )
    assert list(resumed.losses) == [7, 8, 9, 10, 11, 12]
    assert resumed.losses == {step: loss for step, loss in trained.losses.items() if step > 6}
    assert resumed.scores == {step: score for step, score in trained.scores.items() if step >= 6}


def test_the_engine_is_a_few_lines_of_python(ade20k, tmp_path):
    """The README's example, with the demo's config made small."""
    options = dict(option.split("=", 1) for option in data_options(ade20k)) | {
        "runner.max_iters": 2,
        "data.samples_per_gpu": 2,
        "engine.global_batch": 2,
    }
    script = f"""
from internseg_ds import SegmentorEngine

options = {options!r}
with SegmentorEngine({TINY!r}, "ds_configs/zero3_bf16.json", work_dir={str(tmp_path)!r}, cfg_options=options) as engine:
    engine.train()
    print(engine.evaluate().metrics["mIoU"])
"""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 <= float(done.stdout.splitlines()[-1]) < 0.2


def test_losses_that_are_not_finite_end_with_3_and_name_step_rank_and_images(train):
    run = train(
        "--no-validate",
        options=[
            "runner.max_iters=9",
            "checkpoint_config.interval=0",
            "data.train.pipeline.6.std=[1e-45,1e-45,1e-45]",  # images of infinite values
            "engine.max_skipped_steps=3",
        ],
        launcher="deepspeed",
        check=False,
    )
    assert run.returncode == 3 and re.search(
        r"3 steps in a row, .*step 3, .*rank 1: \S+ADE_train_", run.output
    )
    noted = [json.loads(line) for line in (run.work_dir / "skipped_steps.jsonl").read_text().splitlines()]
    assert [note["step"] for note in noted] == [1, 2, 3]
    assert all(
        len(rank[0]["images"]) == 2 and rank[0]["loss"] == "nan" for note in noted for rank in note["ranks"]
    )


def test_a_run_leaves_checkpoints_metrics_log_curve_and_its_configs(trained):
    folder = trained.work_dir
    assert (folder / "checkpoints" / "latest").read_text() == "iter_12"
    assert (folder / "checkpoints" / "best").read_text() in ("iter_6", "iter_12")
    for name in ("curves.png", "train.log", "config.py", "ds_config.json"):
        assert (folder / name).stat().st_size > 0
    assert any((folder / "tensorboard").iterdir())
    assert set(trained.scores) == {0, 6, 12}
    assert set(trained.losses) == set(range(1, 13))


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "python"])
def test_other_launchers_train_too(launcher, train):
    run = train(
        "--no-validate", options=["runner.max_iters=2", "checkpoint_config.interval=0"], launcher=launcher
    )
    assert set(run.losses) == {1, 2}


@pytest.mark.slow
def test_processes_that_srun_started_form_one_run(ade20k, tmp_path):
    port, processes = free_port(), []
    for rank in range(2):
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        env |= {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": str(rank),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_ID": "7",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
        command = [
            sys.executable,
            "launch/train.py",
            TINY,
            "--work-dir",
            tmp_path,
            "--no-validate",
            "--cfg-options",
            *SMALL,
            *data_options(ade20k),
            "runner.max_iters=2",
            "checkpoint_config.interval=0",
        ]
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors[-2000:]
    assert "2 processes on cpu" in (tmp_path / "train.log").read_text()


def test_a_frozen_vit_keeps_its_weights_while_its_fpn_and_heads_train(train):
    from internseg_ds.checkpoints.weights import open_weights

    run = train(
        "--no-validate",
        options=[
            "model.backbone.freeze_vit=True",
            "runner.max_iters=3",
            "checkpoint_config.interval=1",
            "checkpoint_config.max_keep_ckpts=-1",
        ],
    )
    first, third = (open_weights(run.work_dir / "checkpoints" / f"iter_{step}") for step in (1, 3))
    changed = {name for name in first.shapes if not torch.equal(first.read(name), third.read(name))}
    assert not any(
        name.startswith(
            ("backbone.blocks", "backbone.patch_embed", "backbone.pos_embed", "backbone.cls_token")
        )
        for name in changed
    )
    assert "decode_head.conv_seg.weight" in changed and "backbone.up1.0.weight" in changed
