"""A short soak ends as it should: the faults are injected, and nothing differs from the run without them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.benchmark
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("fsfreeze"), reason="mounts disks of its own: needs root"
)
def test_a_short_soak_loses_nothing(tmp_path):
    sizes = ["--steps", "150", "--save-every", "25", "--evaluate-every", "50", "--every", "5"]
    command = [sys.executable, "benchmarks/soak.py", "--out", str(tmp_path / "soak"), *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert last["faults"] > 0 and last["wrong"] == 0 and last["weights_that_differ"] == 0
    assert (tmp_path / "soak" / "soak.png").exists()
