"""What a run ran on, for the first lines of its log: versions, command, date, hosts."""

import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import internseg_ds

PACKAGES = ("deepspeed", "mmcv-full", "mmsegmentation")


def environment_lines(seed: int, hosts: Sequence[str]) -> list[str]:
    """hosts: the host name of each process."""
    versions = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        f"internseg_ds {_version('internseg-ds')}{_revision()}",
    ]
    places = ", ".join(f"{count} on {host}" for host, count in Counter(hosts).items())
    return [
        ", ".join(versions),
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, seed {seed}, {len(hosts)} process{'es' * (len(hosts) > 1)}: {places}",
        f"command: {shlex.join([sys.executable, *sys.argv])}",
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of no known version"


def _revision() -> str:
    """Of the package's git checkout, where it is one."""
    root = Path(internseg_ds.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return f" (git {said.stdout.strip()})"
    return ""
