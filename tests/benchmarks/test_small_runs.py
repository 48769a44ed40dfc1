"""Benchmarks that take some seconds at their smallest run to their last line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k
from tests.conftest import ROOT

TINY = ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"


def last_line(script: str, *args: object) -> Any:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("script", "args", "ratio"),
    [
        ("background_save", "--million 1 --rounds 1", "ratio"),
        ("evaluate", "--images 2 --rounds 1", "ours_over_mmseg"),
        ("data_loading", "--config CONFIG --batches 1 --rounds 1", "ratio"),
    ],
)
def test_it_ends_with_a_ratio(script, args, ratio, config):
    assert last_line(script, *args.replace("CONFIG", str(config)).split())[ratio] > 0


@pytest.fixture
def config(tmp_path) -> Path:
    """The tiny experiment with generated images."""
    write_generated_ade20k(tmp_path / "ade", training=16, validation=1)
    text = f"_base_ = {str(TINY)!r}\ndata = dict(train=dict(data_root={str(tmp_path / 'ade')!r}))\n"
    (tmp_path / "config.py").write_text(text)
    return tmp_path / "config.py"
