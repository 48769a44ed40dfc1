"""What a run runs on, for the first lines of its log: versions, command, date, hosts."""

import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import torch

from internseg_ds.errors import counted
from internseg_ds.monitoring.installed import git_revision, version_of

PACKAGES = ("deepspeed", "mmcv-full", "mmsegmentation")
UNKNOWN = "of no known version"


def environment_lines(seed: int, hosts: Sequence[str]) -> list[str]:
    """Versions, then date, seed and hosts, then the command. hosts: the host name of each process."""
    versions = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        *(f"{name} {version_of(name) or UNKNOWN}" for name in PACKAGES),
        f"internseg_ds {version_of('internseg-ds') or UNKNOWN}{git_revision()}",
    ]
    places = ", ".join(f"{count} on {host}" for host, count in Counter(hosts).items())
    return [
        ", ".join(versions),
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, seed {seed}, "
        f"{counted(len(hosts), 'process')}: {places}",
        f"command: {shlex.join([sys.executable, *sys.argv])}",
    ]
