"""The whole life of a segmentor in some minutes on a CPU: generated data, training under ZeRO-3,
consolidation, evaluation, pictures.

Each step is the command that a user would type; this script only puts them in order and sums up what came
out.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from internseg_ds.device import device_type

CONFIG = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
ADE20K = Path("data/ade/ADEChallengeData2016")
WORK = Path("work_dirs/demo")
LEAST_MIOU = 45.0
"""What the trained demo scores at least, in percent; 52 is usual."""


def step(title: str, command: str) -> None:
    """Shows and runs one command; ends the demo with its exit code when it fails."""
    print(f"\n== {title}\n$ {command}", flush=True)
    code = subprocess.run(shlex.split(command)).returncode
    if code:
        sys.exit(code)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help; it takes no arguments
    began = time.monotonic()
    python = sys.executable
    # on CPUs, two share the machine
    processes = min(2, torch.cuda.device_count()) if device_type() == "cuda" else 2
    real = ADE20K.exists() and not (ADE20K / "GENERATED.json").exists()
    # a real ADE20K stays as it is; the demo trains on generated scenes all the same
    root = Path("data/generated_ade20k") if real else ADE20K
    data = f"data.train.data_root={root} data.val.data_root={root} data.test.data_root={root}"
    step("a small data set in ADE20K's layout", f"{python} -m internseg_ds.synthetic.generated_ade20k {root}")
    step(
        "full tuning under ZeRO-3",
        f"deepspeed --num_gpus {processes} launch/train.py {CONFIG} --deepspeed_config "
        f"ds_configs/zero3_bf16.json --work-dir {WORK} --overwrite "
        f"--cfg-options engine.evaluate_before=True {data}",
    )
    step(
        "one file out of the ZeRO checkpoint",
        f"{python} launch/consolidate.py {WORK}/checkpoints {WORK}/segmentor.pth --overwrite",
    )
    step(
        "evaluation of that file, with pictures",
        f"deepspeed --num_gpus {processes} launch/test.py {CONFIG} {WORK}/segmentor.pth --eval mIoU --out "
        f"{WORK}/evaluation --show-dir {WORK}/pictures "
        f"--cfg-options {data}",
    )

    records = [json.loads(line) for line in (WORK / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["mIoU"] for record in records if "mIoU" in record}
    latest = (WORK / "checkpoints" / "latest").read_text()
    after = json.loads((WORK / "evaluation" / "results.json").read_text())["mIoU"]
    print(f"""
demo finished in {(time.monotonic() - began) / 60:.1f} minutes
  mIoU before training   {scores[0]:6.2f} %
  mIoU after training    {scores[max(scores)]:6.2f} %   (step {max(scores)}, during training)
  mIoU of the one file   {after:6.2f} %
  ZeRO checkpoint        {WORK}/checkpoints/{latest}
  one-file checkpoint    {WORK}/segmentor.pth
  log, metrics           {WORK}/train.log, {WORK}/metrics.jsonl
  the run on a page      {WORK}/report.html
  curve                  {WORK}/curves.png
  scores by class        {WORK}/evaluation
  pictures               {WORK}/pictures

to go on by hand: . .venv/bin/activate""")
    if after < max(LEAST_MIOU, 10 * scores[0]):
        sys.exit(
            f"error: a score of {after:.2f} % is below what this demo reaches (at least {LEAST_MIOU:.0f} %, and "
            "ten times that of the untrained model); "
            f"see {WORK}/train.log"
        )


if __name__ == "__main__":
    main()
