"""Trained runs that several tests look at: each is made once a session, with 2 processes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.distributed.process_group import World
from internseg_ds.preflight.preflight import Plan, check
from tests.conftest import EOMT, IMAGE, MASK2FORMER, ROOT, TIMM, TINY, TRANSFORMERS, Launch, data_options

SMALL = [
    "model.backbone.embed_dim=32",
    "model.backbone.num_heads=2",
    "model.decode_head.in_channels=[32,32,32,32]",
    "model.decode_head.channels=16",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=16",
    "data.samples_per_gpu=2",
    "engine.global_batch=4",
    "log_config.interval=1",
    "lr_config.warmup_iters=5",
    "engine.peak_tflops=0.4",
]
"""What makes the demo's config quick: blocks of width 32, 4 images a step, no measurement of the peak that
mfu is relative to."""
SMALL_IMAGE = [
    "model.backbone.channels=8",
    "model.backbone.depths=[1,1,2,1]",
    "model.backbone.groups=[1,2,4,4]",
    "model.backbone.level2_post_norm_block_ids=[0]",
    "model.decode_head.in_channels=[8,16,32,64]",
    "model.auxiliary_head.in_channels=32",
    "optimizer.paramwise_cfg.depths=[1,1,2,1]",
    "optimizer.paramwise_cfg.num_layers=5",
    *[option for option in SMALL if "backbone" not in option and "in_channels" not in option],
]
"""The same for the demo on InternImage."""
SMALL_MASK2FORMER = [
    option
    for option in SMALL
    if not option.startswith(("model.auxiliary_head.", "model.decode_head.channels"))
]
SMALL_LIBRARY = [option for option in SMALL if "backbone" not in option and "in_channels" not in option]
SMALL_EOMT = [option for option in SMALL_MASK2FORMER if option in SMALL_LIBRARY]
SMALLER = {
    TINY: SMALL,
    IMAGE: SMALL_IMAGE,
    MASK2FORMER: SMALL_MASK2FORMER,
    TIMM: SMALL_LIBRARY,
    TRANSFORMERS: SMALL_LIBRARY,
    EOMT: SMALL_EOMT,
}

NO_NOISE = [
    "model.backbone.drop_path_rate=0",
    "model.decode_head.dropout_ratio=0",
    "model.auxiliary_head.dropout_ratio=0",
]


STEPS = 20
LONG = [f"runner.max_iters={STEPS}", f"checkpoint_config.interval={STEPS}", *NO_NOISE]


def experiment_of(config: str, ade20k: Path, options: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a config file of the project, on the generated data."""
    return read_experiment(
        ROOT / config, dict(option.split("=") for option in data_options(ade20k)) | dict(options or {})
    )


def checked(experiment: Experiment, *, validate: bool = True) -> Plan:
    """What the checks before a run of two processes under ZeRO-3 find."""
    return check(experiment, ROOT / "ds_configs/zero3_bf16.json", World(0, 2, 0), validate=validate)


@dataclass(frozen=True)
class Run:
    work_dir: Path
    output: str
    returncode: int

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in (self.work_dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.records if "loss" in record}

    @property
    def scores(self) -> dict[int, float]:
        return {record["step"]: record["mIoU"] for record in self.records if "mIoU" in record}


@pytest.fixture(scope="session")
def train(launch: Launch, ade20k: Path, tmp_path_factory: pytest.TempPathFactory):
    """train(*arguments, options=[...], config=TINY, prepare=f, **launch settings) -> Run: launch/train.py on
    a small model and the generated data.

    prepare: called with the work directory before the run.
    """

    def run(
        *arguments: object,
        options: Sequence[str] = (),
        config: str = TINY,
        prepare: Callable[[Path], None] = lambda _: None,
        **settings,
    ) -> Run:
        work_dir = tmp_path_factory.mktemp("run")
        prepare(work_dir)
        done = launch(
            "launch/train.py",
            config,
            "--work-dir",
            work_dir,
            *arguments,
            "--cfg-options",
            *SMALLER[config],
            *data_options(ade20k),
            *options,
            **settings,
        )
        return Run(work_dir, done.stdout + done.stderr, done.returncode)

    return run


@pytest.fixture(scope="session")
def long_run(train, once_for_all_workers):
    """long_run(name) -> Run: STEPS steps under ds_configs/NAME.json without noise, saved at the end; each
    made once."""

    def made(name: str) -> Run:
        arguments = ("--deepspeed_config", f"ds_configs/{name}.json", "--no-validate")
        return once_for_all_workers(f"long_run_{name}", lambda: train(*arguments, options=LONG))

    return made


@pytest.fixture(scope="session")
def trained(train, once_for_all_workers) -> Run:
    """12 steps under ZeRO-3, saved and evaluated at step 6 and 12, with all the noise that training has;
    started and measured as users do."""
    options = [
        "runner.max_iters=12",
        "checkpoint_config.interval=6",
        "evaluation.interval=6",
        "engine.evaluate_before=True",
        "engine.peak_tflops=None",
    ]
    return once_for_all_workers("trained", lambda: train(options=options, launcher="deepspeed"))


@pytest.fixture(scope="session")
def fp32(tmp_path_factory) -> Path:
    """ds_configs/zero3_autocast.json, switched to fp32."""
    ds = json.loads((ROOT / "ds_configs/zero3_autocast.json").read_text())
    ds["torch_autocast"]["enabled"] = False
    path = tmp_path_factory.mktemp("ds") / "zero3_fp32.json"
    path.write_text(json.dumps(ds))
    return path
