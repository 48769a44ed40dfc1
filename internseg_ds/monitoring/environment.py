"""What a run runs on, for the first lines of its log: versions, command, date, hosts."""

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
from internseg_ds.errors import counted

PACKAGES = ("deepspeed", "mmcv-full", "mmsegmentation")


def environment_lines(seed: int, hosts: Sequence[str]) -> list[str]:
    """Versions, then date, seed and hosts, then the command. hosts: the host name of each process."""
    versions = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        *(f"{name} {_version(name)}" for name in PACKAGES),
        f"internseg_ds {_version('internseg-ds')}{_revision()}",
    ]
    places = ", ".join(f"{count} on {host}" for host, count in Counter(hosts).items())
    return [
        ", ".join(versions),
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}, seed {seed}, "
        f"{counted(len(hosts), 'process')}: {places}",
        f"command: {shlex.join([sys.executable, *sys.argv])}",
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of no known version"


def _revision() -> str:
    """ " (git ...)" where the package is a git checkout."""
    root = Path(internseg_ds.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return f" (git {described.stdout.strip()})"
    return ""
