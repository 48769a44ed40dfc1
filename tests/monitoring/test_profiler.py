import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.watchdog import Watchdog
from internseg_ds.errors import ConfigError
from internseg_ds.monitoring.profiler import StepProfile, check_profiled_steps
from internseg_ds.monitoring.trace_summary import COMMUNICATION, MATMUL, break_down
from internseg_ds.training.segmentor_engine import SegmentorEngine
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment


def read(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def a_profile_changes_no_loss_and_leaves_evaluations_out(root: Path, folder: Path) -> None:
    options = [
        "runner.max_iters=3",
        "engine.global_batch=8",
        "engine.peak_tflops=1",
        "engine.recomputation=blocks",
    ]
    plain, profiled = folder / "plain", folder / "profiled"
    with SegmentorEngine(
        small_experiment(root, *options), ROOT / "ds_configs/zero3_bf16.json", work_dir=plain, validate=False
    ) as engine:
        engine.train()
    with SegmentorEngine(
        small_experiment(root, *options, "evaluation.interval=2"),
        ROOT / "ds_configs/zero3_bf16.json",
        work_dir=profiled,
        profiled_steps=2,
    ) as engine:
        hooks = len(engine.deepspeed.module.decode_head._forward_hooks)
        engine.train()
        assert len(engine.deepspeed.module.decode_head._forward_hooks) == hooks
    path = profiled / "profile" / f"rank{dist.get_rank()}.json.gz"
    trace = read(path)
    found = break_down(trace)
    assert list(found.steps_s) == ["step 2", "step 3"]
    assert sum(found.shares.values()) == pytest.approx(1)
    assert {
        "data",
        "backbone forward",
        "heads forward",
        "losses forward",
        "losses backward",
        "heads backward",
        "backbone recomputed",
        "backbone backward",
        "update",
    } <= {part for _, part in found.shares}
    assert (
        all(found.shares[MATMUL, f"{part} backward"] > 0 for part in ("backbone", "heads"))
        and found.of_kind(COMMUNICATION) > 0
    )
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [
        (event["ts"], event["ts"] + event["dur"]) for event in events if event["name"].startswith("step ")
    ]
    between = [
        event["name"]
        for event in events
        if event["name"] == "aten::conv2d" and not any(start <= event["ts"] < end for start, end in steps)
    ]
    assert between == []  # the evaluation after step 2 is full of them
    assert sum(event["name"] == "data" for event in events) == 2 * 2  # micro-batches
    dist.barrier()
    if dist.get_rank() == 0:
        losses = [
            [
                record["loss"]
                for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
                if "loss" in record
            ]
            for run in (plain, profiled)
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 3
        summary, log = (
            (profiled / "profile" / "summary.txt").read_text(),
            (profiled / "train.log").read_text(),
        )
        assert "norms, elementwise, copies" in summary and "Self CPU time total" in summary
        assert f"profile of steps 2 to 3: {path}" in log and summary.splitlines()[5] in log
        assert sorted(file.name for file in (profiled / "profile").iterdir()) == [
            "rank0.json.gz",
            "rank1.json.gz",
            "summary.txt",
        ]


@pytest.mark.slow
def test_a_profile_changes_no_loss_and_leaves_evaluations_out(ade20k, tmp_path):
    spawn(a_profile_changes_no_loss_and_leaves_evaluations_out, 2, ade20k, tmp_path)


@pytest.mark.parametrize(
    ("start", "last", "steps", "expected"),
    [
        (0, 100, 3, [5, 6, 7]),
        (40, 100, 2, [45, 46]),
        (0, 5, 3, [3, 4, 5]),
        (0, 2, 3, [1, 2]),
        (9, 10, 3, [10]),
        (0, 100, 0, []),
    ],
)
def test_a_run_that_is_short_is_profiled_sooner(start, last, steps, expected, tmp_path):
    assert [*profile_of(tmp_path, steps, start=start, last=last).steps] == expected


def profile_of(folder: Path, steps: int, *, start: int = 0, last: int = 9) -> StepProfile:
    return StepProfile(
        folder,
        steps,
        nn.ModuleDict({"backbone": nn.Identity()}),
        World(),
        Watchdog(World(), hang_s=0),
        start=start,
        last=last,
    )


def train(profile: StepProfile, steps: int, *, then: Callable[[], None] = lambda: None) -> None:
    """A loop like the trainer's; `then` is called in the middle of the step after these."""
    with profile:
        for step in range(1, steps + 2):
            for doing in ("data", "forward", "backward", "update", "agreeing"):
                profile.at(step, doing)
                torch.ones(3) + 1
                if step > steps and doing == "backward":
                    then()
                    return
            profile.end_step(step, pauses=False)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_what_was_recorded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(profile_of(tmp_path, 3), 5, then=interrupt)
    assert list(break_down(read(tmp_path / "rank0.json.gz")).steps_s) == ["step 5", "step 6"]


def test_a_run_that_stops_early_leaves_what_was_recorded(tmp_path, caplog, monkeypatch):
    # a run before may have switched it off
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "internseg_ds")
    train(profile_of(tmp_path, 3), 4)
    assert "step 5" in (tmp_path / "summary.txt").read_text()
    train(profile_of(tmp_path / "none", 3), 2)
    assert "stopped before step 5" in caplog.text and not (tmp_path / "none").exists()


def test_a_failure_is_passed_on_and_the_next_profile_works(tmp_path):
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(profile_of(tmp_path, 3), 5, then=fail)
    assert not any(tmp_path.iterdir()) and not torch.autograd._profiler_enabled()
    train(profile_of(tmp_path, 3), 8)
    assert list(break_down(read(tmp_path / "rank0.json.gz")).steps_s) == ["step 5", "step 6", "step 7"]


def test_a_profile_that_cannot_be_written_costs_no_training(tmp_path, caplog, monkeypatch):
    # a run before may have switched it off
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    (tmp_path / "taken").write_text("")
    train(profile_of(tmp_path / "taken" / "profile", 2), 8)
    assert "the profile is not written: " in caplog.text and "the training goes on" in caplog.text
    with pytest.MonkeyPatch.context() as full:
        full.setattr(
            "gzip.GzipFile.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        train(profile_of(tmp_path / "profile", 2), 8)
    assert "No space left on device" in caplog.text and not any((tmp_path / "profile").iterdir())


@pytest.mark.parametrize("steps", [-1, 21, True, 2.0])
def test_a_number_of_steps_that_cannot_be_profiled_is_refused(steps):
    with pytest.raises(ConfigError, match="steps from 1 to 20"):
        check_profiled_steps(steps)


def test_the_command_line_refuses_it_too(launch, tmp_path):
    done = launch("launch/train.py", "--profile", TINY, "--work-dir", tmp_path, processes=1, check=False)
    assert done.returncode == 2 and "write --profile 3" in done.stderr
