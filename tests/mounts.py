"""Mounts that only one process of a test sees."""

import subprocess

import pytest

CLONE_NEWNS = 0x20000
"""Of linux/sched.h: mounts of its own."""


def skip_without_mounts() -> None:
    """Skips the test where the machine allows no mounts of its own."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts of its own")
