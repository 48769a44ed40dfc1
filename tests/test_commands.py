"""The commands' modules are commands themselves (`python -m`), as launch/ and the console scripts are, and
whatever can be started says with --help what it is, and does nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

from internseg_ds.version import VERSION
from tests.conftest import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "demo")


def scripts(folder: str) -> list[str]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [str(file.relative_to(ROOT)) for file in files if '__name__ == "__main__"' in file.read_text()]


@pytest.mark.parametrize(
    "command", [name if name == "train" else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
)
def test_a_module_of_a_command_runs_it(command):
    done = subprocess.run(
        [sys.executable, "-m", f"internseg_ds.cli.{command}", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert VERSION in done.stdout


@pytest.mark.parametrize("script", [*scripts("launch"), *scripts("docs"), *scripts("internseg_ds")])
def test_help_is_printed_and_nothing_else_is_done(script, launch):
    done = launch(script, "--help", processes=1, timeout=60)
    assert done.stdout.startswith("usage: ")
    if Path(script).parent.name == "launch" and Path(script).stem in COMMANDS:
        assert "example" in done.stdout and script in done.stdout.partition("example")[2]


@pytest.mark.slow
@pytest.mark.parametrize("script", scripts("benchmarks"))
def test_help_of_benchmarks_is_printed_and_nothing_else_is_done(script, launch):
    done = launch(script, "--help", processes=1, launcher="python", timeout=60)
    assert "usage: " in done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_help_of_shell_scripts(script):
    command = ["sh", f"launch/{script}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert f"launch/{script} PARTITION" in done.stdout
