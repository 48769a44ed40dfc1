"""One real step of a run on the CPU, for `--dry-run`: what the meta device cannot show (hooks, partitions,
mixed dtypes, custom backward passes) ends here.

In: a plan that has passed every check. Out: a message of what was tried, or a ConfigError. The step runs in
a process of its own that sees no GPU, alone, with random weights, 2 images and the same ZeRO stage: forward,
backward, update, and one window of an evaluation. It runs on a corner of the images first; where that fails,
whole training images decide.
"""

import argparse
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from internseg_ds.config.ds_config import DsConfig
from internseg_ds.distributed.process_group import LAUNCHERS
from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.backbone import patch_size
from internseg_ds.preflight.preflight import Plan

IMAGES = 2
"""A batch norm over one pixel needs two values; where two fail and a process of the run has one, that is
tried."""
SIDE = 224
"""Pixels of the corner's sides, at most: a whole number of patches and strides of every common backbone."""
LARGEST = 1_500_000_000
"""Parameters of a model that is tried: a larger one takes a CPU many minutes."""
BYTES = 24
"""Per parameter, at most, of weights, gradients, fp32 master weights and moments while a step runs in one process."""
LIMIT_S = 900
"""Seconds after which a trial is given up."""
LOCAL_ZERO_KEYS = ("offload_", "zero_hpz", "zero_quantized", "mics_")
"""Beginnings of keys of `zero_optimization` that say where states lie or how GPUs of a node talk, which one
process on a CPU does not."""
KEPT = (
    "bf16",
    "torch_autocast",
    "data_types",
    "gradient_clipping",
    "zero_allow_untested_optimizer",
    "timers",
)
NOT_ON_CPUS = "not implemented for"
"""In torch's words where a CPU lacks a kernel for a dtype that GPUs have one for."""


@dataclass(frozen=True)
class Trial:
    """What the process of a trial is given. options: of `--cfg-options`. validates: whether the run
    evaluates."""

    config: str
    options: Mapping[str, Any]
    ds: DsConfig
    side: int | None
    """Of the corner; None: whole images."""
    validates: bool


def why_untried(plan: Plan) -> str | None:
    """Why a step of this run is not tried here; None where it can be."""
    params = sum(param.numel() for param in plan.meta_model.parameters())
    available = psutil.virtual_memory().available
    if params <= LARGEST and BYTES * params <= available / 2:
        return None
    return (
        f"no step is tried on the CPU: {params:,} parameters would take up to {BYTES * params / 2**30:,.0f} GiB "
        f"and minutes ({available / 2**30:,.0f} GiB of memory are free)"
    )


def try_step(plan: Plan, options: Mapping[str, Any]) -> str:
    """Runs a step and says what ran. options: of `--cfg-options`, with which the plan's config was read.

    Raises ConfigError when the step fails.
    """
    began, side = time.monotonic(), _corner_side(plan)
    validates = plan.val_set is not None
    counts = sorted({IMAGES, min(IMAGES, plan.ds.micro_batch)}, reverse=True)
    whole = [
        Trial(plan.experiment.path, options, _alone(plan.ds, images), None, validates) for images in counts
    ]
    # the first that works will do
    for trial in ([replace(whole[0], side=side)] if side is not None else []) + whole:
        if (failure := _run(trial)) is None:
            break
    size = (
        f"{trial.side} x {trial.side} pixels" if trial.side else " x ".join(map(str, plan.crop)) + " pixels"
    )
    count = f"{trial.ds.micro_batch} image{'s' * (trial.ds.micro_batch > 1)}"
    tried = (
        f"one step of {count} of {size}, in one process on the CPU with random weights, under "
        f"ZeRO-{plan.ds.stage}"
    )
    if failure is None:
        return (
            f"{tried}{', and a window of an evaluation' * trial.validates}: ran in "
            f"{time.monotonic() - began:.0f} s"
        )
    if not failure.certain or NOT_ON_CPUS in failure.reason:
        return f"{tried}: could not be tried to its end ({failure.reason})"
    raise ConfigError(f"this model cannot train under {plan.ds.source}: {failure.reason} (tried: {tried})")


@dataclass(frozen=True)
class Failure:
    """Of a trial. certain: whether the model is at fault, as far as its process could say."""

    reason: str
    certain: bool


def _corner_side(plan: Plan) -> int | None:
    """Sides of the corner that is tried first; None where training images are no larger."""
    unit = math.lcm(patch_size(plan.meta_model.get_submodule("backbone")), 32)
    side = SIDE // unit * unit
    return side if 0 < side < min(plan.crop) else None


def _alone(ds: DsConfig, images: int) -> DsConfig:
    """The ds_config for one process on a CPU and so many images: the same stage, precision and hooks, with
    all states in memory."""
    zero = {
        key: value
        for key, value in ds.raw["zero_optimization"].items()
        if not key.startswith(LOCAL_ZERO_KEYS)
    }
    raw = {key: ds.raw[key] for key in KEPT if key in ds.raw}
    raw |= {
        "zero_optimization": zero,
        "train_batch_size": images,
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": 1,
    }
    return replace(ds, raw=raw, micro_batch=images, accumulation=1, world_size=1, cpu_adam=False)


def _run(trial: Trial) -> Failure | None:
    """The trial in a process of its own; why it failed."""
    launchers = {name for names in LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if key not in launchers}
    env |= {"INTERNSEG_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder, "trial"), Path(folder, "result")
        task.write_bytes(pickle.dumps(trial))
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, task, result],
                env=env,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return Failure(f"it took more than {LIMIT_S} s", certain=False)
        if result.is_file():
            reason = json.loads(result.read_text())
            return Failure(reason, certain=True) if reason else None
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return Failure(f"its process ended with code {done.returncode}: {last}", certain=False)


def main(task: Path, result: Path) -> None:
    """What the process does: writes into `result` why the step failed, or an empty text."""
    logging.disable(logging.WARNING)
    trial: Trial = pickle.loads(task.read_bytes())
    reason = ""
    try:
        _step(trial)
    except Exception as error:  # whatever a layer refuses with
        reason = reason_of(error)
    result.write_text(json.dumps(reason))


def _step(trial: Trial) -> None:
    from internseg_ds.config.experiment import read_experiment
    from internseg_ds.data.datasets import build_datasets
    from internseg_ds.data.loading import training_batches
    from internseg_ds.data.sampler import GlobalBatchSampler
    from internseg_ds.distributed.construction import build_on_meta, choose_trained
    from internseg_ds.distributed.gathering import forwards
    from internseg_ds.distributed.precision import ComputeDtypes, heads_dtype
    from internseg_ds.distributed.process_group import join, leave, world_from_environment
    from internseg_ds.training.deepspeed_engine import build_deepspeed_engine, loss_terms

    # compiling takes longer than the step, and few CPUs multiply float8
    options = {**trial.options, "engine.compile": False, "engine.matmul_dtype": "bfloat16"}
    experiment, ds, world = read_experiment(trial.config, options), trial.ds, world_from_environment()
    asked = experiment.engine.backbone_dtype
    # "auto": as GPUs will
    compute = torch.float32 if asked == "float32" or ds.precision == "fp32" else torch.bfloat16
    meta_model = build_on_meta(experiment.model)
    choose_trained(meta_model, experiment.engine)
    heads = heads_dtype(experiment.engine.heads_dtype, meta_model, ds.precision)
    dataset = build_datasets(experiment.train, "data.train")
    batch = next(
        training_batches(
            dataset,
            GlobalBatchSampler(len(dataset), ds.micro_batch, seed=0),
            workers=0,
            seed=0,
            device=world.device,
        )
    )
    inputs = batch.inputs
    if trial.side is not None:
        inputs = _corner(inputs, tuple(inputs["img"].shape[-2:]), trial.side)
    join(world)
    engine = build_deepspeed_engine(
        experiment,
        ds,
        meta_model,
        world.device,
        seed=0,
        dtypes=ComputeDtypes(compute, heads),
        recomputation=experiment.engine.recomputation,
    )
    engine.train()
    engine.backward(loss_terms(engine, inputs)["loss"])
    engine.step()
    if trial.validates:
        for weights in ("whole", "partitioned") if ds.stage == 3 else ("whole",):
            with forwards(
                engine.module,
                experiment.model,
                compute,
                world.device,
                heads=heads,
                autocast=ds.precision == "autocast",
                weights=weights,
            ) as ready:
                ready(inputs["img"][:1], inputs["img_metas"][:1])
                ready.finish()
    engine.destroy()
    leave()


def _corner(value: Any, size: tuple[int, int], side: int) -> Any:
    """`value` with all its maps of `size` (img, labels, masks) cut to the corner."""
    if isinstance(value, Tensor):
        return (
            value[..., :side, :side].contiguous()
            if value.dim() > 1 and tuple(value.shape[-2:]) == size
            else value
        )
    if isinstance(value, dict):
        return {key: _corner(item, size, side) for key, item in value.items()}
    if isinstance(value, list):
        return [_corner(item, size, side) for item in value]
    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="What `launch/train.py --dry-run` starts: one training step on the CPU."
    )
    parser.add_argument("task", type=Path)
    parser.add_argument("result", type=Path)
    main(**vars(parser.parse_args()))
