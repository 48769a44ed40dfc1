import logging
from dataclasses import replace

import psutil
import pytest

from internseg_ds.distributed.process_group import World
from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.forecast import compare, conclusion, forecast, verdict
from internseg_ds.engine.planner import Planner
from internseg_ds.engine.run_warnings import shortfall
from internseg_ds.planning.devices import DEVICES
from internseg_ds.planning.footprint import MARGIN
from internseg_ds.planning.step_time import Assumptions, Cluster
from tests.conftest import ROOT, TINY

EIGHT = Cluster(DEVICES["H100"], 1, 8, 50.0)
OURS = ROOT / "ds_configs"
MIB = 2**20


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(read_experiment(ROOT / TINY, {"engine.global_batch": 32}))


def plan(planner: Planner, name: str, device_bytes: float = 2**35, host_bytes: float | None = None):
    return forecast(planner, OURS / f"{name}.json", EIGHT, Assumptions(), device_bytes, host_bytes)


def test_the_peak_is_that_of_the_fullest_phase_and_decides_what_fits(planner):
    found = plan(planner, "zero1_bf16")
    peak = found.footprint.peak
    assert peak == max(
        sum(part.device for part in found.footprint.parts if phase in part.phases)
        for phase in ("train", "update", "evaluate")
    )
    assert (
        found.fits
        and replace(found, device_bytes=found.footprint.needed).fits
        and found.footprint.needed == peak + int(MARGIN * 2**35)
    )
    short = replace(found, device_bytes=found.footprint.needed - 1)
    assert not short.fits and "does not fit" in verdict(short)
    hosted = plan(planner, "zero3_bf16_offload_all", host_bytes=1.0)
    assert hosted.fits_device and not hosted.fits_host and not hosted.fits
    assert hosted.host == 8 * hosted.footprint.host


def test_an_evaluation_copies_the_weights_where_there_is_room(planner):
    def parts(device_bytes: float, **options) -> dict[str, int]:
        chosen = Planner(read_experiment(ROOT / TINY, {"engine.global_batch": 32, **options}))
        return {
            part.name: part.device
            for part in plan(chosen, "zero3_bf16", device_bytes).footprint.parts
            if part.name.startswith("evaluation")
        }

    total = 2 * sum(param.numel() for param in planner.model.parameters())
    roomy, tight = parts(2**35), parts(2**31 + 8 * MIB)
    assert roomy["evaluation: a whole copy of the weights"] == total
    assert "evaluation: a whole copy of the weights" not in tight
    assert roomy["evaluation: 8 windows"] > tight["evaluation: 1 window"]
    assert (
        parts(2**31 + 8 * MIB, **{"engine.evaluation_weights": "whole"})[
            "evaluation: a whole copy of the weights"
        ]
        == total
    )


def test_windows_of_an_evaluation_are_halved_until_they_fit(planner):
    def windows(device_bytes: float) -> str:
        return next(
            part.name
            for part in plan(planner, "zero1_bf16", device_bytes).footprint.parts
            if "window" in part.name
        )

    needed = plan(planner, "zero1_bf16").footprint.device("evaluate")
    assert windows(2**35) == "evaluation: 8 windows"
    assert windows((needed - 20 * MIB) / (1 - MARGIN)) in ("evaluation: 4 windows", "evaluation: 2 windows")
    assert windows(2**30) == "evaluation: 1 window"


def test_the_moving_average_and_the_background_save_are_parts():
    plain, more = (
        Planner(read_experiment(ROOT / TINY, {"engine.global_batch": 32, **options}))
        for options in ({}, {"engine.ema": 0.9, "engine.background_save": True})
    )
    trained = sum(plain.setting_sizes)
    plain, more = (plan(each, "zero3_bf16").footprint for each in (plain, more))
    assert more.device("update") - plain.device("update") == 4 * (trained // 8)
    assert more.host - plain.host == 16 * (trained // 8)
    assert more.checkpoint - plain.checkpoint == 4 * trained


def test_the_conclusion_names_what_fits_and_the_fastest(planner):
    paths = [OURS / f"{name}.json" for name in ("zero1_bf16", "zero3_bf16", "zero3_bf16_offload_all")]
    found = compare(planner, paths, EIGHT, Assumptions(), 2**35, None)
    steps = {path.stem: plan.row.time.step for path, plan in found.items()}
    assert steps[conclusion(found).split("Fastest: ")[1].split(",")[0]] <= 1.01 * min(steps.values())
    small = max(plan.footprint.peak for plan in found.values()) - 1
    fewer = compare(planner, paths, EIGHT, Assumptions(), small, None)
    assert "These fit" in conclusion(fewer) and len(
        [path for path in paths if path.stem in conclusion(fewer)]
    ) < len(paths)
    assert "None of these ds_configs fits" in conclusion(
        compare(planner, paths, EIGHT, Assumptions(), 1.0, None)
    )
    alone = compare(
        planner,
        [OURS / "zero3_bf16_hpz.json"],
        Cluster(DEVICES["H100"], 1, 2, 50.0),
        Assumptions(),
        2**35,
        None,
    )
    assert list(map(type, alone.values())) == [str]


def warning(monkeypatch, memory: float, name: str = "zero2_bf16", **options) -> str | None:
    experiment = read_experiment(ROOT / TINY, {"engine.global_batch": None, **options})
    planner, world = Planner(experiment), World(size=2, launcher="deepspeed")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 2 * memory}))
    return shortfall(planner, planner.resolve(OURS / f"{name}.json", world.size)[0], world)


def test_a_run_that_will_not_fit_is_warned_with_figures_and_a_mend(monkeypatch, caplog):
    assert warning(monkeypatch, 64 * 2**30) is None
    said = warning(monkeypatch, 3.5 * 2**30)  # the two buckets of ZeRO-2 alone take 1.9
    assert "it needs " in said and "there are 3.5" in said and "the largest part is" in said
    assert "ds_configs/zero3_bf16" in said and "would need" in said
    assert "none of the ds_configs beside it would fit" in warning(monkeypatch, 0.5 * 2**30)
    assert not [
        record for record in caplog.records if record.levelno >= logging.WARNING
    ]  # a test before may have left the level lower


def test_a_model_that_is_small_beside_the_memory_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(Planner, "footprint", lambda *_, **__: pytest.fail("it was"))
    assert warning(monkeypatch, 64 * 2**30) is None


def test_a_model_that_cannot_be_planned_is_a_line_of_the_log_and_no_error(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Planner, "footprint", lambda *_, **__: 1 / 0)
    assert warning(monkeypatch, 1.0) is None
    assert "could not be planned: ZeroDivisionError" in caplog.text
