"""benchmarks/train_step.py and benchmarks/growth.py: what their fairness rests on, and (marked `benchmark`,
up to a minute each) that they run to their last line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def workload(monkeypatch):
    # where `python benchmarks/train_step.py` finds them
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import workload

    return workload


def test_the_other_contenders_train_on_the_images_that_our_engine_hands_to_the_same_rank(workload):
    from mmseg.datasets import build_dataset

    from internseg_ds.data.loading import training_batches
    from internseg_ds.data.sampler import GlobalBatchSampler

    made, cpu = workload.Workload(micro_batch=3), torch.device("cpu")
    dataset = build_dataset(made.experiment.data.train)
    for rank in (0, 1):
        sampler = GlobalBatchSampler(len(dataset), made.micro_batch, rank=rank, world_size=2)
        theirs = workload.micro_batches(made, rank, 2, cpu)
        for batch, other in zip(
            (
                next(ours)
                for ours in [training_batches(dataset, sampler, workers=0, seed=0, device=cpu)]
                for _ in range(4)
            ),
            theirs,
        ):
            assert torch.equal(batch.inputs["img"], other["img"]) and torch.equal(
                batch.inputs["gt_semantic_seg"], other["gt_semantic_seg"]
            )


@pytest.mark.parametrize("groups", [1, 10, 50, 98])
def test_the_model_of_the_groups_curve_falls_into_as_many_groups_as_asked_for(workload, groups):
    from internseg_ds.distributed.construction import build_on_meta
    from internseg_ds.optimization.parameter_groups import parameter_groups

    cfg = workload.Workload(options=workload.vit(64, 48, 4), groups=groups).experiment
    model = build_on_meta(cfg.model)
    made = parameter_groups(model, cfg.optimizer)
    assert len(made) == groups
    assert sum(len(group["params"]) for group in made) == len(list(model.parameters()))


def test_the_fitted_exponent_is_that_of_a_power_law(workload):
    import growth

    assert math.isclose(growth.exponent([1, 2, 5, 7], [3 * x**1.7 for x in (1, 2, 5, 7)]), 1.7)


def test_the_6b_size_is_refused_in_a_sentence_where_it_has_no_room(workload):
    if torch.cuda.is_available() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 119 * 2**30:
        pytest.skip("this machine may have room")
    done = run("train_step.py", "--size", "6b", "--world", "1")
    # 20 bytes of fp32 state for each of 6.4 B parameters
    assert done.returncode == 1 and "needs 119 GiB of host memory" in done.stderr.splitlines()[-1]


@pytest.mark.benchmark
def test_train_step_ends_with_a_ratio_between_contenders_whose_losses_agree():
    done = run(
        "train_step.py",
        "--contenders",
        "ours",
        "bare_deepspeed",
        "--world",
        "1",
        "--rounds",
        "1",
        "--steps",
        "2",
    )
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["ratio"] == pytest.approx(
        line["seconds"]["ours"] / line["seconds"]["bare_deepspeed"], rel=1e-2
    )
    assert line["loss_difference"]["bare_deepspeed"] < 1e-5


@pytest.mark.benchmark
def test_growth_ends_with_an_exponent_for_each_series():
    line = json.loads(
        run("growth.py", "classes", "--points", "2", "--rounds", "1", "--steps", "2").stdout.splitlines()[-1]
    )
    assert line["curve"] == "classes" and len(line["points"]) == 2
    assert all(math.isfinite(value) for value in line["exponents"]["ZeRO-3, 1 process"].values())


@pytest.mark.benchmark
def test_checksums_ends_with_a_ratio_for_saves_and_for_resumes():
    line = json.loads(run("checksums.py", "--million", "2", "--rounds", "2").stdout.splitlines()[-1])
    assert {"save", "resume_from_the_disk", "resume_from_the_cache"} < line.keys() and all(
        value > 0 for value in line.values()
    )


@pytest.mark.benchmark
def test_the_doctors_time_is_set_against_decoding():
    line = json.loads(
        run("check_data.py", "--images", "32", "--size", "64", "--rounds", "1").stdout.splitlines()[-1]
    )
    assert line["ratio"] == pytest.approx(line["doctor_s"] / line["decoding_s"], rel=0.5)


def run(script: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *args], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
