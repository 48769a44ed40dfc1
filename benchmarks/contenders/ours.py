"""This project: the loop that `launch/train.py` runs, with its log records, watch and votes, timed by its own
record of the timed steps."""

import json
import time
from pathlib import Path

from timing import Timed, peak_bytes, reset_peak, train_on
from workload import Workload

from internseg_ds import SegmentorEngine


def run(workload: Workload, work_dir: Path) -> Timed:
    with SegmentorEngine(
        workload.experiment,
        workload.ds_config,
        work_dir=work_dir,
        validate=False,
        load_from=workload.weights,
        saves=False,  # disks are not the subject
    ) as engine:
        train_on(engine, workload.warmup, log_every=1)
        stamps: list[float] = []
        engine.deepspeed.module.register_forward_pre_hook(lambda *_: stamps.append(time.process_time()))
        reset_peak(engine.world.device)
        train_on(engine, workload.steps, log_every=workload.steps)
        peak = peak_bytes(engine.world.device)
        # from forward to forward: without what `train` does at its end
        cpu = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1)
        if not engine.world.is_main:
            return Timed(0.0, [], peak, cpu)
        records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        return Timed(
            engine.plan.ds.global_batch / records[-1]["images_per_s"],
            [record["loss"] for record in records[: workload.warmup]],
            peak,
            cpu,
        )
