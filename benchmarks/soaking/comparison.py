"""Two runs held against each other: the records of every step, the scores, and the last weights, trained and
averaged, bit by bit."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from soaking.attempt import ROOT


def records(work_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def differing_records(one: Path, other: Path) -> list[str]:
    """What is wrong with the records of `other`: steps or scores that are missing, twice there, or of other
    values."""
    found = []
    for what in ("loss", "mIoU"):
        those = [
            {record["step"]: record[what] for record in records(work_dir) if what in record}
            for work_dir in (one, other)
        ]
        counts = Counter(record["step"] for record in records(other) if what in record)
        found += [
            f"{what} of step {step} stands there {count} times"
            for step, count in sorted(counts.items())
            if count > 1
        ]
        found += [
            f"{what} of step {step} is {those[1].get(step)}, not {value}"
            for step, value in those[0].items()
            if those[1].get(step) != value
        ]
    return found


def differing_weights(one: Path, other: Path, out: Path) -> list[str]:
    """Tensors of the last checkpoints that are not equal to the last bit."""
    found = []
    for average in ((), ("--ema",)):
        files = []
        for number, work_dir in enumerate((one, other)):
            files.append(out / f"{'average' if average else 'weights'}_{number}.safetensors")
            command = [
                sys.executable,
                "launch/consolidate.py",
                str(work_dir / "checkpoints"),
                str(files[-1]),
                "--overwrite",
                *average,
            ]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        ours, theirs = map(load_file, files)
        found += [
            f"{' '.join(average)} {name}"
            for name in ours.keys() | theirs.keys()
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
        ]
    return found
