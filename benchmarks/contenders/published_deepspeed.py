"""The published backbone in a bare DeepSpeed loop, with the same ds_config as all the others."""

from pathlib import Path

from timing import Timed
from workload import Workload

from contenders.published import deepspeed


def run(workload: Workload, work_dir: Path) -> Timed:
    return deepspeed(workload)
