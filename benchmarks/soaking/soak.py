"""A training that is disturbed again and again, started anew whenever it ends, until it has made its last
step."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import psutil

from soaking.attempt import OPEN_FILES, Attempt, command
from soaking.clock import Clock
from soaking.disk import Disk
from soaking.faults import IO_TIMEOUT_S, Fault, deck
from soaking.vitals import shm_bytes

log = logging.getLogger("soak")
TO_BEGIN_S = 240.0
TO_END_S = 180.0
T = TypeVar("T")


@dataclass
class Event:
    """A fault and what came of it. reached, resumed: the last step logged before the attempt ended, and the
    one that the next went on from. seconds: until the last process had gone. left_mib: of /dev/shm, when it
    had. problem: what should not have been; empty for nothing."""

    fault: str
    step: int
    code: int | None = None
    reached: int = 0
    resumed: int = 0
    seconds: float = 0.0
    left_mib: float = 0.0
    traceback: bool = False
    problem: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return max(0, self.reached - self.resumed) if self.code is not None else 0


def training_command(
    work_dir: Path, data: Path, *, steps: int, save_every: int, evaluate_every: int
) -> list[str]:
    """A tiny InternViT with UPerNet under ZeRO-3, its average, and saves in the background."""
    options = [
        "model.backbone.embed_dim=32",
        "model.backbone.num_heads=2",
        "model.decode_head.in_channels=[32,32,32,32]",
        "model.decode_head.channels=16",
        "model.auxiliary_head.in_channels=32",
        "model.auxiliary_head.channels=16",
        "data.samples_per_gpu=1",
        "engine.global_batch=2",
        *(f"data.{split}.data_root={data}" for split in ("train", "val", "test")),
        f"runner.max_iters={steps}",
        "log_config.interval=1",
        f"checkpoint_config.interval={save_every}",
        "checkpoint_config.max_keep_ckpts=3",
        f"evaluation.interval={evaluate_every}",
        "engine.peak_tflops=0.4",
        "engine.background_save=True",
        "engine.ema=0.999",
        f"engine.io_timeout={IO_TIMEOUT_S:g}",
    ]
    return command(
        work_dir,
        "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py",
        "ds_configs/zero3_bf16.json",
        options,
    )


class Soak:
    """The disturbed run. `attempt` is the one that runs, or ran last; `events` what was done so far."""

    def __init__(
        self,
        command: Sequence[str],
        work_dir: Path,
        out: Path,
        disk: Disk,
        clock: Clock,
        *,
        save_every: int,
        every_s: float,
        seed: int,
    ) -> None:
        """every_s: seconds of undisturbed training between two faults, on average."""
        self.command, self.work_dir, self.out, self.disk, self.clock = command, work_dir, out, disk, clock
        self.save_every, self.every_s, self.random = save_every, every_s, Random(seed)
        self.checkpoints = work_dir / "checkpoints"
        self.attempts, self.events = 0, list[Event]()
        self.attempt: Attempt

    def run(self) -> None:
        """Until the training has ended with 0. Raises RuntimeError where it does not go on."""
        faults = deck(self.random)
        self.start()
        self._begun()
        while True:
            pause = min(max(self.random.expovariate(1 / self.every_s), self.every_s / 4), 3 * self.every_s)
            self.attempt.wait(self.attempt.ended, pause)
            if self.attempt.ended():
                if self.attempt.launcher.returncode == 0:
                    return
                raise RuntimeError(
                    f"{self.attempt.log} ended with {self.attempt.launcher.returncode}, and nobody had "
                    "disturbed it"
                )
            self._disturb(next(faults))
            if self.attempt.ended() and self.attempt.launcher.returncode == 0:
                return

    def start(self, *, open_files: int = OPEN_FILES) -> None:
        self.attempts += 1
        self.attempt = Attempt(
            self.command,
            self.work_dir,
            self.out / f"attempt_{self.attempts:03d}.log",
            self.clock.environment,
            open_files=open_files,
        )

    def any_of(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def newest(self) -> Path:
        """The newest complete checkpoint, whatever `latest` says: a fault may have changed it."""
        complete = [note.parent for note in self.checkpoints.glob("iter_*/internseg_ds.json")]
        return max(complete, key=lambda path: int(path.name.removeprefix("iter_").split(".")[0]))

    def wait_for_saves(self, number: int) -> None:
        """Until so many more were due, or the attempt has ended."""
        due = (self.attempt.step() or 0) + number * self.save_every
        self.attempt.wait(lambda: self.attempt.ended() or (self.attempt.step() or 0) > due, 60.0 * number)

    def _begun(self) -> None:
        if not self.attempt.wait(self.attempt.trains, TO_BEGIN_S):
            raise RuntimeError(f"{self.attempt.log}: no step after {TO_BEGIN_S:.0f} s")

    def _disturb(self, fault: Fault) -> None:
        attempt = self.attempt
        event = Event(fault.name, attempt.step() or 0)
        if not self.checkpoints.joinpath("latest").exists():
            self.wait_for_saves(2)
        if fault.at_start:
            attempt.ranks()[0].terminate()
            attempt.wait(attempt.ended, TO_END_S)
            event.reached = attempt.step() or 0
        log.info("step %d: %s", event.step, fault.name)
        began = time.monotonic()
        try:
            act = fault.act(self)
            next(act)
            attempt = self.attempt  # a fault of a start made it
            if fault.ends:
                self._ended(attempt, event, fault)
                event.seconds = time.monotonic() - began
            next(act, None)
        except (IndexError, OSError, psutil.Error) as error:
            # what was to be harmed has just gone: no fault, then
            event.problem.append(f"not injected: {error!r}")
            self.disk.thaw()
        if fault.ends or attempt.ended():
            if attempt.launcher.returncode == 0:
                event.code = 0
                self._note(event)
                return
            if not fault.ends:
                self._ended(attempt, event, fault)
            event.reached = max(event.reached, attempt.step() or 0)
            self.start()
            self._begun()
            event.resumed = self.attempt.resumed_at()
            if event.lost > fault.loses * self.save_every:
                event.problem.append(f"{event.lost} steps to be made again")
        else:
            there = attempt.step() or 0
            if not attempt.wait(lambda: attempt.ended() or (attempt.step() or 0) > there + 2, 60):
                event.problem.append("it does not get on")
        self._note(event)

    def _ended(self, attempt: Attempt, event: Event, fault: Fault) -> None:
        """Waits for its last process, and notes how it ended."""
        if not attempt.wait(attempt.ended, TO_END_S):
            left = [" ".join(process.cmdline())[:80] for process in attempt.processes() if _there(process)]
            event.problem.append(f"not ended after {TO_END_S:.0f} s: {left}")
            attempt.kill()
            attempt.wait(attempt.ended, 30)
        event.code = attempt.launcher.poll()
        event.left_mib = round(shm_bytes() / 2**20, 2) if "shm" not in fault.name else 0.0
        event.traceback = b"Traceback (most recent call last)" in attempt.said()
        if event.code not in fault.ends and event.code != 0:
            event.problem.append(f"ended with {event.code}")

    def _note(self, event: Event) -> None:
        self.events.append(event)
        with self.out.joinpath("events.jsonl").open("a") as file:
            file.write(json.dumps(_as_json(event)) + "\n")
        log.info(
            "  code %s, %d steps to be made again, %.0f s%s",
            event.code,
            event.lost,
            event.seconds,
            f"  PROBLEM: {'; '.join(event.problem)}" if event.problem else "",
        )


def _as_json(event: Event) -> Mapping[str, Any]:
    return asdict(event) | {"lost": event.lost, "seconds": round(event.seconds, 1)}


def _there(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and bool(process.cmdline())
    return False
