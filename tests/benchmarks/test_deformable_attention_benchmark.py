"""benchmarks/deformable_attention.py runs to its last line, and what it compares agrees."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.benchmark
def test_deformable_attention_ends_with_a_ratio_between_versions_that_agree():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/deformable_attention.py", "--side", "64", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ratio"] > 0
    differences = [float(found) for found in re.findall(r"largest difference (\S+)", done.stdout)]
    assert len(differences) >= 2 and max(differences) < 1e-3
