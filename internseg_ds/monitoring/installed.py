"""What is installed here: versions of packages, and the state of our own checkout. Imports none of them."""

import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import internseg_ds


def version_of(package: str) -> str | None:
    """By its name for pip; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str:
    """ " (git ...)" where our package is a git checkout, with "-dirty" where it has changes; "" elsewhere."""
    root = Path(internseg_ds.__file__).parent.parent
    if not (root / ".git").exists():
        return ""
    described = output_of("git", "-C", str(root), "describe", "--always", "--dirty")
    return f" (git {described})" if described else ""


def output_of(*command: str) -> str:
    """What a program prints; "" where there is no such program, or it fails or hangs."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()
    return ""
