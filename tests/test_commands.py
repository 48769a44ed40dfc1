"""The commands' modules are commands themselves (`python -m`), as launch/ and the console scripts are."""

import subprocess
import sys

import pytest

from internseg_ds.version import VERSION
from tests.conftest import ROOT

COMMANDS = sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_of_a_command_runs_it(command):
    done = subprocess.run(
        [sys.executable, "-m", f"internseg_ds.cli.{command}", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert VERSION in done.stdout
