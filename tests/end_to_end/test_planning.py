"""launch/plan.py as a user runs it: once in a process of its own, and for the rest in this one, which has
everything imported."""

import re
import runpy
import sys

import pytest
from mmcv import DictAction

from internseg_ds.config.experiment import read_experiment
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from tests.conftest import ROOT, TINY
from tests.end_to_end.conftest import LONG, SMALL, STEPS

WIDE = {"COLUMNS": "200"}
SIX_B = "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"


@pytest.fixture
def plan(monkeypatch, capsys):
    """plan(*args) -> (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["launch/plan.py", *args])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("launch/plan.py", run_name="__main__")
        return ended.value.code or 0, *capsys.readouterr()

    return run


def columns(output: str) -> list[dict[str, str]]:
    """Of each number of nodes: the cells of the table, by line."""
    lines = [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in output.splitlines()
        if line.startswith(("│", "┃"))
    ]
    labels, *columns = zip(*lines)
    return [dict(zip(labels, column)) for column in columns]


def cells(output: str) -> dict[str, list[str]]:
    """Of each line of the tables, by its first cell: the other cells."""
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    return {first: others for first, *others in lines}


@pytest.mark.slow
def test_the_command_that_help_shows_estimates_the_six_billion_recipe(launch, plan):
    _, shown, _ = plan("--help")
    command = shown[shown.index("python launch/plan.py") :].replace("\\\n", " ").split()
    done = launch(*command[1:], "--host-memory", "1TiB", processes=1, launcher="python", env=WIDE)
    table, state = cells(done.stdout), 6_385_968_940 / 8 / 2**30  # parameters per GPU, over 2^30
    assert [float(table[part][0]) for part in ("weights", "gradients", "optimizer")] == pytest.approx(
        [2 * state, 2 * state, 12 * state], abs=0.01
    )
    peaks = [float(cell) for cell in table["together"][:3]]
    assert f"Peak: {max(peaks):.1f} GiB per GPU" in done.stdout and "of 79.1, of which 4.7" in done.stdout
    assert "1024: fits" in done.stdout
    assert float(table["zero3_bf16"][0]) == pytest.approx(max(peaks), abs=0.1)
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} <= set(table)
    assert re.search(r"These fit: .*zero1_bf16.*Fastest: \w+", done.stdout)
    assert "not measured" in done.stdout


def test_one_gpu_of_80_gib_holds_the_six_billion_recipe_with_its_state_on_the_host_alone():
    estimator = Estimator(read_experiment(ROOT / SIX_B))
    found = {
        name: estimator.training_memory(
            estimator.resolve(ROOT / f"ds_configs/{name}.json", 1)[0], Platform(79 * 2**30)
        )
        for name in ("zero2_bf16", "zero3_bf16", "zero3_bf16_offload_optimizer", "zero3_bf16_offload_all")
    }
    assert {name for name, each in found.items() if each.peak < 79 * 2**30} == {
        "zero3_bf16_offload_optimizer",
        "zero3_bf16_offload_all",
    }
    state = 6_385_968_940  # 16 bytes per parameter of weights, gradients, optimizer
    assert found["zero3_bf16"].peak > 16 * state
    # gradients in fp32 too
    assert (
        found["zero3_bf16_offload_all"].host
        > 20 * state
        > found["zero3_bf16_offload_optimizer"].host
        > 18 * state
    )
    assert found["zero3_bf16_offload_all"].peak < found["zero3_bf16_offload_optimizer"].peak


@pytest.mark.parametrize(
    ("name", "bytes_per_parameter"),
    [("zero3_bf16", 10), pytest.param("zero3_bf16_only", 8, marks=pytest.mark.slow)],
)
def test_one_gpu_of_80_gib_holds_the_six_billion_recipe_with_moments_in_8_bits(name, bytes_per_parameter):
    estimator = Estimator(
        read_experiment(ROOT / SIX_B, {"engine.optimizer_states": "8bit", "data.samples_per_gpu": 2})
    )
    memory = estimator.training_memory(
        estimator.resolve(ROOT / f"ds_configs/{name}.json", 1)[0], Platform(80 * 2**30)
    )
    assert memory.fits and memory.host < 5 * 2**30
    states = sum(part.device for part in memory.states)
    assert states / 6_385_968_940 == pytest.approx(bytes_per_parameter + 8 / 256, rel=1e-3)
    assert memory.peak < 75 * 2**30


def test_what_does_not_fit_and_what_cannot_run_is_named(plan):
    code, out, err = plan(TINY, "--gpus", "1", "--gpu-memory", "1GiB", "--host-memory", "1GiB")
    assert code == 0, err
    assert out.count("does not fit") == 2 and "None of these ds_configs fits" in out
    assert {row[2] for name, row in cells(out).items() if name.startswith("zero")} == {"no"}
    assert "zero3_bf16_hpz: zero_hpz_partition_size=8" in out


def test_a_table_over_numbers_of_nodes(plan):
    code, out, err = plan(SIX_B, "--nodes", "1,2,64")
    assert code == 0, err
    table = columns(out)
    assert [(column["nodes"], column["GPUs"], column["images per step"]) for column in table] == [
        ("1", "8", "16"),
        ("2", "16", "32*"),
        ("64", "512", "1024*"),
    ]
    # 16 bytes per parameter, over 8 GPUs
    assert float(table[0]["state, GiB per GPU"]) == pytest.approx(16 * 6_385_968_940 / 8 / 2**30, abs=0.1)
    # one node sends nothing to others
    assert float(table[0]["sent between, GB"]) == 0 < float(table[1]["sent between, GB"])
    assert not re.search("…", out)


def test_options_choose_the_cluster(plan):
    def first(*options: str) -> dict[str, str]:
        code, out, err = plan(TINY, *options)
        assert code == 0, err
        return columns(out)[0]

    for nodes, gpus, images in (("3", "6", "24*"), ("1", "2", "8")):
        found = first("--nodes", nodes, "--gpus-per-node", "2")
        assert (found["GPUs"], found["images per step"]) == (gpus, images)
    assert (
        "2 x B200 per node, 12.5 GB/s"
        in plan(TINY, "--nodes", "1", "--gpu", "B200", "--gpus-per-node", "2", "--interconnect", "12.5")[1]
    )
    slow, usual = (
        float(first("--nodes", "2", *options)["step, s"]) for options in (["--interconnect", "0.001"], [])
    )
    assert slow > 2 * usual
    assert "90% of the peak" in plan(TINY, "--nodes", "1", "--achieved", "0.9")[1]
    assert "123 GB/s within a node" in plan(TINY, "--nodes", "1", "--nvlink", "123")[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.py"], "missing.py"),
        ([TINY, "--deepspeed_config", "missing.json"], "there is no ds_config missing.json"),
        ([TINY, "--nodes", "0"], "'0' is no whole number of at least 1"),
        ([TINY, "--nodes", "two"], "argument --nodes"),
        ([TINY, "--gpus", "0"], "'0' is no whole number of at least 1"),
        ([TINY, "--gpus", "12"], "--gpus 12 do not fill nodes of 8"),
        ([TINY, "--gpus", "8", "--nodes", "1"], "not allowed with"),
        ([TINY, "--gpu-memory", "80"], "80 has no unit; write 80GiB"),
        ([TINY, "--achieved", "45"], "it is a share"),
        ([TINY, "--interconnect", "-1"], "is no number above 0"),
        (
            [TINY, "--nodes", "1", "--cfg-options", "engine.backbone_dtype=float32"],
            "engine.backbone_dtype='float32'",
        ),
    ],
)
def test_what_has_no_estimate_is_refused_with_an_error_message(args, message, plan):
    code, _, err = plan(*args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_what_trains_in_fp32_has_a_memory_and_no_time(plan, tmp_path):
    (tmp_path / "fp32.json").write_text('{"zero_optimization": {"stage": 2}}')
    code, out, err = plan(
        TINY,
        "--gpus",
        "2",
        "--deepspeed_config",
        str(tmp_path / "fp32.json"),
        "--gpu-memory",
        "24GiB",
        "--cfg-options",
        "engine.ema=0.99",
        "engine.background_save=True",
    )
    assert code == 0, err
    assert (
        "Peak: " in out
        and "of 24.0, of which 1.4" in out
        and "Time: no estimate." in out
        and "These fit: fp32." in out
    )
    assert {"moving average", "save in the background"} <= set(cells(out))


def test_a_checkpoint_takes_as_much_of_the_disk_as_estimated(long_run, launch, tmp_path):
    for name in ("zero1_bf16", "zero3_bf16"):
        run = long_run(name)
        options = {
            key: DictAction._parse_iterable(value)
            for key, value in (option.split("=", 1) for option in [*SMALL, *LONG])
        }
        estimator = Estimator(read_experiment(ROOT / TINY, options))
        ds, _ = estimator.resolve(ROOT / f"ds_configs/{name}.json", 2)
        memory = estimator.training_memory(ds, Platform(2**35))
        found = sum(
            file.stat().st_size for file in (run.work_dir / "checkpoints" / f"iter_{STEPS}").iterdir()
        )
        tensors = sum(1 for _ in estimator.model.parameters())
        # names, shapes and the config's text weigh on so small a model
        assert memory.checkpoint == pytest.approx(found, abs=0.02 * found + 2 * 1500 * tensors)
    launch("launch/consolidate.py", run.work_dir / "checkpoints", tmp_path / "out.safetensors", processes=1)
    assert memory.consolidated == pytest.approx((tmp_path / "out.safetensors").stat().st_size, rel=0.05)
