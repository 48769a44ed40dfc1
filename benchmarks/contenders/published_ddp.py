"""The published backbone under torch's DistributedDataParallel (every rank holds everything), in the loop
that mmcv's runner makes of it."""

from pathlib import Path

from timing import Timed
from workload import Workload

from contenders.published import ddp


def run(workload: Workload, work_dir: Path) -> Timed:
    return ddp(workload)
