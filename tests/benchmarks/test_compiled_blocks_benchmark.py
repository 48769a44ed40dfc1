"""benchmarks/compiled_blocks.py runs to its last line, and what it compares agrees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.benchmark
def test_compiled_blocks_ends_with_a_ratio_between_blocks_that_agree():
    small = ["--models", "intern_vit", "--width", "64", "--depth", "2", "--size", "56", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/compiled_blocks.py", *small],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    assert row["ratio"] > 0 and row["graphs"] == 2 and row["compile_s"] > 0
    assert row["loss_difference"] < 1e-5
