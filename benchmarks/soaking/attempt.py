"""One start of a training: the `deepspeed` launcher, its ranks and their data workers, until the last of them
has gone."""

import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RANKS = 2
STEP = re.compile(rb" step +(\d+)/\d+ .* loss ")
RESUMED = re.compile(rb"resumed from .*: step (\d+),")
OPEN_FILES = 1024


def command(work_dir: Path, config: str, ds_config: str, options: Sequence[str]) -> list[str]:
    """What a user would type; it goes on from what there is."""
    return [
        "deepspeed",
        "--num_gpus",
        str(RANKS),
        "--master_port",
        "{port}",
        "launch/train.py",
        config,
        "--deepspeed_config",
        ds_config,
        "--work-dir",
        str(work_dir),
        "--resume",
        "auto",
        "--heartbeat-timeout",
        "20",
        "--cfg-options",
        *options,
    ]


class Attempt:
    """Starts at once. environment: beside this process's own. open_files: how many each process may have."""

    def __init__(
        self,
        command: Sequence[str],
        work_dir: Path,
        log: Path,
        environment: Mapping[str, str],
        *,
        open_files: int = OPEN_FILES,
    ) -> None:
        self.work_dir, self.log = work_dir, log
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env = (
            os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "INTERNSEG_DEVICE": "cpu",
            }
            | environment
        )

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

        with log.open("wb") as file:
            self.launcher = subprocess.Popen(
                [word.replace("{port}", str(port)) for word in command],
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=limit,
            )
        self.session = self.launcher.pid

    def processes(self) -> list[psutil.Process]:
        """All that are left of it, whoever their parents are now; zombies are left out."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The training processes, without their workers."""
        there = [
            process
            for process in self.processes()
            if _has(process, "launch/train.py") and _has(process, "--local_rank")
        ]
        pids = {process.pid for process in there}
        return [process for process in there if _parent(process) not in pids]

    def workers(self) -> list[psutil.Process]:
        ranks = {rank.pid for rank in self.ranks()}
        return [
            process
            for process in self.processes()
            if _parent(process) in ranks and _has(process, "launch/train.py")
        ]

    def node_launcher(self) -> psutil.Process | None:
        """deepspeed's launch.py, the parent of the ranks."""
        return next(
            (process for process in self.processes() if _has(process, "deepspeed.launcher.launch")), None
        )

    def said(self) -> bytes:
        return self.log.read_bytes()

    def step(self) -> int | None:
        """The last one that it logged; None before the first."""
        found = STEP.findall(self.said())
        return int(found[-1]) if found else None

    def resumed_at(self) -> int:
        found = RESUMED.findall(self.said())
        return int(found[-1]) if found else 0

    def ended(self) -> bool:
        return self.launcher.poll() is not None and not self.processes()

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in time."""
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def trains(self, more: int = 1) -> bool:
        """Whether it has begun, and made so many steps or ended."""
        step = self.step()
        return self.ended() or (step is not None and step >= self.resumed_at() + more)

    def kill(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()


def _has(process: psutil.Process, word: str) -> bool:
    with suppress(psutil.Error):
        return any(word in part for part in process.cmdline())
    return False


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.Error):
        return process.ppid()
    return None
