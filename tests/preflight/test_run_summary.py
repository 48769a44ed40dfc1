import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internseg_ds.distributed.precision import ComputeDtypes
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from internseg_ds.preflight.run_summary import Destination, summary
from tests.conftest import TINY
from tests.end_to_end.conftest import checked, experiment_of

DTYPES = ComputeDtypes(torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def plan(ade20k):
    options = {"runner.max_iters": 46, "engine.global_batch": 8, "evaluation.interval": 10}
    return checked(experiment_of(TINY, ade20k, options | {"checkpoint_config.interval": 5}))


def rows(plan, estimator, saves=True):
    to = Destination(Path("/runs/one"), saves, "cd here && train --resume auto")
    lines = summary(plan, estimator, DTYPES, to)
    assert len({re.match(r"(\S+ )*\S+ {2,}", line).end() for line in lines}) == 1  # aligned
    return {line[:11].strip(): line[12:] for line in lines}


def test_a_summary_says_what_is_trained_on_what_and_where_it_goes(plan):
    found = rows(plan, Estimator(plan.experiment, plan.meta_model, crop=plan.crop))
    parameters = sum(param.numel() for param in plan.meta_model.parameters())
    assert (
        f"InternViT6B, UPerHead, FCNHead: {parameters / 1e6:.2f} M parameters, all trained" in found["model"]
    )
    assert found["weights"] == "random"
    assert found["data"] == "23 training images, 7 for validation, 150 classes"
    assert (
        found["batch"].startswith("8 images per step = 2 processes x ")
        and "46 steps = 16.0 epochs" in found["batch"]
    )
    assert (
        "ZeRO-3, bfloat16 parameters, backbone computes in bfloat16, heads in float32" in found["precision"]
    )
    assert found["evaluates"].startswith("every 10 steps, best by mIoU; saves every 5 steps")
    assert found["written to"].startswith("/runs/one: train.log, libraries.log, metrics.jsonl")
    assert "/runs/one/STOP: it saves and ends" in found["to stop"]
    assert found["to resume"] == "cd here && train --resume auto"


@pytest.mark.slow
def test_a_run_that_is_large_beside_its_memory_has_a_figure_of_it(plan, monkeypatch):
    small = Platform(2**30, on_gpu=False, compute=torch.bfloat16)
    monkeypatch.setattr(Platform, "of_this_process", lambda *_: small)
    estimator = Estimator(plan.experiment, plan.meta_model, crop=plan.crop)
    needed = estimator.training_memory(plan.ds, small).peak / 2**30
    assert (
        rows(plan, estimator)["plan"] == f"{needed:.1f} of 1.0 GiB per process; by the estimate, not measured"
    )


def test_a_run_that_saves_nothing_and_trains_a_part_says_so(plan):
    estimator = Estimator(plan.experiment, plan.meta_model, crop=plan.crop)
    for param in plan.meta_model.backbone.parameters():
        param.requires_grad_(False)
    found = rows(replace(plan, val_set=None), estimator, saves=False)
    for param in plan.meta_model.backbone.parameters():
        param.requires_grad_(True)
    assert re.search(r"M parameters, \S+ M trained \(\d+\.\d%\)", found["model"])
    assert found["evaluates"] == "never; saves nothing" and "to resume" not in found
    assert found["data"].startswith("23 training images, none for validation")
