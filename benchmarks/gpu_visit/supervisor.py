"""Runs jobs one after the other, each in a process of its own that is ended when its time is over, with all
that it has started.

In: jobs, a budget of seconds. Out: lines of `Results`; what the processes print goes to log.txt beside them.
A crash, a hang or an out-of-memory error costs that job only, and a killed process leaves no memory on the
GPU.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from gpu_visit.jobs import Job
from gpu_visit.results import ROOT, Line, Results, read

UNFINISHED = 75
MARK = "ON_ONE_GPU_JOB"
"""In the environment of a job's processes, with a value of its own: torchrun starts its own in sessions that
no signal to a group reaches."""


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class Supervisor:
    """ends: of `time.monotonic`. more: words of the command line of each job. say: called with each line as
    it comes."""

    def __init__(
        self,
        results: Results,
        *,
        ends: float,
        rehearse: bool,
        more: Sequence[str] = (),
        say: Callable[[Line], None],
    ) -> None:
        self.results, self.ends, self.rehearse, self.more, self.say = (
            results,
            ends,
            rehearse,
            tuple(more),
            say,
        )
        self.log = results.path.parent / "log.txt"
        self._said, self._size = len(read(results.path)), 0

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    def run(self, jobs: Iterable[Job], *, skip_done: bool) -> bool:
        """Whether all came to their end. Jobs with settings left come again after the others, as long as they
        got on. Raises Stopped."""
        finished = self.results.finished() if skip_done else set()
        waiting, whole, measured_before = deque(job for job in jobs if job.name not in finished), True, {}
        first = True
        while waiting:
            job = waiting.popleft()
            if job.missing:
                self._add(job, "missing", why=job.missing)
                whole = False
            elif self.left_s < (5 if self.rehearse else job.least_s) and not first:
                self._add(
                    job,
                    "no time",
                    why=f"{max(0, self.left_s):.0f} s of the budget were left, and it is not begun with "
                    f"less than {job.least_s:.0f}",
                )
                whole = False
            else:
                status = self._run_one(job, skip_had=skip_done, again=job.name in measured_before)
                count = len(self.results.had(failed=True))
                if status == "unfinished" and count > measured_before.get(job.name, -1) and self.left_s > 0:
                    measured_before[job.name] = count
                    waiting.append(job)
                elif status != "done":
                    whole = False
            first = False
        return whole

    def _run_one(self, job: Job, *, skip_had: bool, again: bool) -> str:
        """again: whether this call has begun this job before, and leaves out what it has met already."""
        limit_s = max(1.0, min(self.left_s, job.most_s))
        soft_s = limit_s - min(20.0, 0.2 * limit_s)
        began, mark, before = time.monotonic(), uuid.uuid4().hex, len(read(self.results.path))
        command = [
            sys.executable,
            str(ROOT / "benchmarks/on_one_gpu.py"),
            "--out",
            str(self.results.path.parent),
            "--job",
            job.name,
            "--seconds",
            str(soft_s),
            *["--rehearse"] * self.rehearse,
            *["--skip-done"] * skip_had,
            *["--go-on"] * again,
            *self.more,
            *[word for path in self.results.earlier for word in ("--earlier", str(path))],
        ]
        env = {
            **os.environ,
            MARK: mark,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.rehearse:
            env |= {
                "INTERNSEG_DEVICE": "cpu",
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
            }
        with self.log.open("ab") as log:
            log.write(f"\n===== {job.name}, {limit_s:.0f} s =====\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() - began < limit_s:
                    time.sleep(0.1)
                    self._tell()
            except Stopped:
                self.results.add(job.part, job.name, "unfinished", why="stopped by a signal")
                raise
            finally:
                code = process.poll()
                with suppress(ProcessLookupError):
                    # where /proc tells no environment, this is what there is
                    os.killpg(process.pid, signal.SIGKILL)
                kill_marked(mark)
                process.wait()
        self._tell()
        took = round(time.monotonic() - began, 1)
        if code is None:
            self._add(job, "timed out", why=f"ended after {took:.0f} s", took_s=took)
            return "timed out"
        if code == UNFINISHED:
            self._add(
                job,
                "unfinished",
                why="settings are left, for want of time or after an error that a fresh process does not "
                "have",
                took_s=took,
            )
            return "unfinished"
        if code:
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._add(job, "crashed", why=f"{ended}: {self._last_words()}", took_s=took)
            return "crashed"
        failed = sum(
            line["status"] == "failed" and line["job"] == job.name
            for line in read(self.results.path)[before:]
        )
        status = "with failures" if failed else "done"
        self._add(job, status, took_s=took, **({"why": f"{failed} of its settings failed"} if failed else {}))
        return status

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
            lines = [
                line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()
            ]
        return lines[-1][:400] if lines else ""

    def _add(self, job: Job, status: str, **values: object) -> None:
        self.results.add(job.part, job.name, status, **values)
        self._tell()

    def _tell(self) -> None:
        size = self.results.path.stat().st_size if self.results.path.exists() else 0
        if size == self._size:
            return
        self._size, lines = size, read(self.results.path)
        for line in lines[self._said :]:
            self.say(line)
        self._said = len(lines)


def kill_marked(mark: str) -> None:
    """Ends all processes that have inherited a job's mark, those that were started meanwhile too."""
    for _ in range(20):
        found = marked(mark)
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes, without those that are ended and not yet waited for (Linux, proc(5))."""
    found, word = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                if word in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
