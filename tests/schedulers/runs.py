"""Commands that run beside a test: started, watched, and gone with it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import ROOT

ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def need(**packages: str) -> None:
    """need(mpirun="openmpi-bin"): fails in one sentence where a program is missing."""
    missing = sorted(
        {
            package
            for program, package in packages.items()
            if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
        }
    )
    assert not missing, (
        f"these tests need programs that are not installed; apt-get install {' '.join(missing)}"
    )


def wait_for(
    condition: Callable[[], object], what: str, *, timeout_s: float = 120, output: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still no {what}\n{output()[-4000:]}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> dict[str, psutil.Process]:
        """The training processes by their RANK, without their data workers."""
        found: dict[str, psutil.Process] = {}
        for process in self.tree():
            try:
                if "launch/train.py" in process.cmdline()[1:3] and process.environ().get("RANK") is not None:
                    found.setdefault(process.environ()["RANK"], process)
            except psutil.Error:
                pass
        return found

    def wait(self, *, timeout_s: float = 180) -> int:
        wait_for(
            lambda: self.process.poll() is not None, "end", timeout_s=timeout_s, output=lambda: self.output
        )
        return self.process.returncode


@contextmanager
def started(
    command: list[object], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Iterator[Started]:
    """A command in the background; what is left of it is killed at the end of the block."""
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **(env or {})},
        )
    run = Started(process, log)
    try:
        yield run
    finally:
        left = run.tree() if process.poll() is None else []
        for each in [*left, process]:
            each.kill()
        process.wait()
