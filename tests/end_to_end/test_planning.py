"""launch/plan.py as a user runs it: once in a process of its own, and for the rest in this one, which has everything imported."""

import re
import runpy
import sys

import pytest

from tests.conftest import ROOT, TINY

WIDE = {"COLUMNS": "200"}


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
    """Of each number of nodes: what the table says, by line."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in output.splitlines() if line.startswith(("│", "┃"))]
    labels, *columns = zip(*lines)
    return [dict(zip(labels, column)) for column in columns]


def test_the_command_that_help_shows_plans_the_six_billion_recipe(launch, plan):
    _, shown, _ = plan("--help")
    command = shown[shown.index("python launch/plan.py") :].replace("\\\n", " ").split()
    done = launch(*command[1:], processes=1, launcher="python", env=WIDE)
    table = columns(done.stdout)
    assert [(column["nodes"], column["GPUs"], column["images per step"]) for column in (table[0], table[1], table[-1])] == [
        ("1", "8", "16"), ("2", "16", "32*"), ("64", "512", "1024*")]
    assert float(table[0]["state, GiB per GPU"]) == pytest.approx(16 * 6_385_968_940 / 8 / 2**30, abs=0.1)  # 16 bytes per parameter, over 8 GPUs
    assert float(table[0]["sent between, GB"]) == 0 < float(table[1]["sent between, GB"])  # one node sends nothing to others
    assert "…" not in launch(*command[1:], "--nodes", "1,2,4,8,16,32,64", processes=1, launcher="python", env={"COLUMNS": "80"}).stdout
    assert "not measured" in done.stdout


def test_options_choose_the_cluster(plan):
    def first(*options: str) -> dict[str, str]:
        code, out, err = plan(TINY, *options)
        assert code == 0, err
        return columns(out)[0]

    for nodes, gpus, images in (("3", "6", "24*"), ("1", "2", "8")):
        found = first("--nodes", nodes, "--gpus-per-node", "2")
        assert (found["GPUs"], found["images per step"]) == (gpus, images)
    assert "2 x B200 per node, 12.5 GB/s" in plan(TINY, "--gpu", "B200", "--gpus-per-node", "2", "--interconnect", "12.5")[1]
    slow, usual = (float(first("--nodes", "2", *options)["step, s"]) for options in (["--interconnect", "0.001"], []))
    assert slow > 2 * usual
    assert "90% of the peak" in plan(TINY, "--achieved", "0.9")[1]
    assert "123 GB/s within a node" in plan(TINY, "--nvlink", "123")[1]


@pytest.mark.parametrize(("args", "message"), [
    (["missing.py"], "missing.py"),
    ([TINY, "--deepspeed_config", "missing.json"], "there is no ds_config missing.json"),
    ([TINY, "--nodes", "0"], "0 is below 1"),
    ([TINY, "--nodes", "two"], "argument --nodes"),
    ([TINY, "--gpus-per-node", "4,8"], "takes one number"),
    ([TINY, "--achieved", "45"], "it is a share"),
    ([TINY, "--interconnect", "-1"], "is not above 0"),
    ([TINY, "--cfg-options", "engine.backbone_dtype=float32"], "cannot be planned"),
])
def test_what_cannot_be_planned_is_refused_in_a_sentence(args, message, plan):
    code, _, err = plan(*args)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
