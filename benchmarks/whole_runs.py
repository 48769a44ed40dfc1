"""Whole trainings of the benchmarks that look at losses and scores: launch/train.py in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcv import Config

ROOT = Path(__file__).resolve().parent.parent


def train(
    cfg: Config,
    ds_config: Mapping[str, Any],
    work_dir: Path,
    *arguments: object,
    script: str = "launch/train.py",
) -> list[dict[str, Any]]:
    """The records of a training. arguments: of the script. Ends the benchmark where it fails."""
    config, ds_file = work_dir.with_suffix(".py"), work_dir.with_suffix(".json")
    config.write_text(cfg.pretty_text)
    ds_file.write_text(json.dumps(ds_config))
    command: list[Any] = [sys.executable, script, config, "--work-dir", work_dir, *arguments]
    command += ["--deepspeed_config", ds_file]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
