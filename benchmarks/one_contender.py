"""Times one contender: what benchmarks/train_step.py and benchmarks/growth.py start for each of their
measurements.

    torchrun --nproc_per_node 2 benchmarks/one_contender.py NAME WORKLOAD.json RESULT.json

Rank 0 writes {seconds, losses, peak_bytes, cpu_seconds, start_bytes, matmul_flops}, or {error} where it could
not run, to RESULT.json.
"""

import argparse
import importlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from timing import matmul_flops, peak_bytes, reset_peak
from workload import Workload

from internseg_ds.distributed.process_group import join, leave, world_from_environment
from internseg_ds.monitoring.run_log import begin_log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a module of benchmarks/contenders")
    parser.add_argument("workload", metavar="WORKLOAD.json", type=Path)
    parser.add_argument("result", metavar="RESULT.json", type=Path)
    args = parser.parse_args()
    name, workload, result = args.name, Workload.read(args.workload), args.result
    begin_log()
    world = world_from_environment()
    # one for all ranks
    work_dir = Path(tempfile.gettempdir(), f"one_contender_{os.environ.get('MASTER_PORT', os.getpid())}")
    try:
        join(world)
        bf16 = workload.ds_config.get("bf16", {}).get("enabled", False)
        peak = matmul_flops(
            torch.bfloat16 if bf16 and world.device.type == "cuda" else torch.float32, world.device
        )
        contender = importlib.import_module(f"contenders.{name}")
        reset_peak(world.device)
        start = peak_bytes(world.device)  # on a CPU, what the libraries take
        timed = contender.run(workload, work_dir)
        if world.is_main:
            result.write_text(json.dumps({**asdict(timed), "start_bytes": start, "matmul_flops": peak}))
        leave()
    except Exception as error:
        if not result.exists():
            result.write_text(
                json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})
            )
        raise


if __name__ == "__main__":
    main()
