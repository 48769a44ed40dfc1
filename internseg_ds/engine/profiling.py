"""`launch/train.py --profile`: a torch.profiler trace of a few steps, a file per rank, and a summary of rank 0's.

In: where the training loop stands. Out: WORK_DIR/profile/rank0.json.gz ... (Perfetto and chrome://tracing open them) and summary.txt. No rank waits for
another one here, and nothing of the training changes: ranges are named, and hooks that name ranges are on the model while it is looked at.
"""

import gzip
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.watch import Doing, Watch
from internseg_ds.engine.outputs import make_folder, unless_disk_full, whole_file
from internseg_ds.engine.trace_summary import summarise
from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.heads import heads

log = logging.getLogger(__name__)

DEFAULT_STEPS, MOST_STEPS = 3, 20
"""A profile is held in memory until it is written: some 0.1 GiB a step for the demo's model, more for those with more operations."""
UNPROFILED = 4
"""Steps before the first one that is recorded: kernels are chosen and queues are filled in these."""


def check_profiled_steps(steps: int) -> int:
    """Raises ConfigError for a number of steps that cannot be profiled; 0 profiles none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
        raise ConfigError(
            f"--profile {steps} must be a whole number of steps from 1 to {MOST_STEPS}; {DEFAULT_STEPS} is the usual one"
        )
    return steps


class StepProfile:
    """One rank's profile of one training; a `with` block around the loop writes what there is when the loop ends early, by Ctrl-C too."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        module: nn.Module,
        world: World,
        watch: Watch,
        *,
        start: int,
        last: int,
    ) -> None:
        """steps: how many are recorded; 0: none. start: the step that the run goes on from. last: the last one of the schedule."""
        self.folder, self.module, self.world, self.watch = folder, module, world, watch
        self.asked = steps
        unprofiled = min(UNPROFILED, max(0, last - start - steps))  # none of a run that is too short
        self.steps = range(start + unprofiled + 1, min(start + unprofiled + steps, last) + 1)
        self.activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (world.device.type == "cuda")]
        self._profiler: profile | None = None
        self._recorded: list[int] = []
        self._off = False
        self._ranges: list[record_function] = []
        """Open ones: of the step, of its part, and in a forward of the backbone or a head."""
        self._hooks: list[Any] = []

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_ranges(0)
        if (
            self._profiler is not None
            and self._recorded
            and (kind is None or issubclass(kind, KeyboardInterrupt))
        ):
            self._finish()
        elif self._profiler is not None:
            with suppress(RuntimeError):  # there may be another error on its way
                self._profiler.stop()
        if self.asked and not self._recorded and kind is None:
            log.info(
                "there is no profile: %s",
                f"the run stopped before step {self.steps[0]}" if self.steps else "no step was left to train",
            )
        self._unhook()

    def at(self, step: int, doing: Doing, micro_batch: int = 0) -> None:
        """This rank has come to this part of this step; the watch is told, too."""
        self.watch.at(step, doing, micro_batch)
        if step not in self.steps:
            return
        if doing == "data" and micro_batch == 0:
            self._begin_step(step)
        self._close_ranges(1)
        self._open(doing)

    def end_step(self, step: int, *, pauses: bool) -> None:
        """This step is over. pauses: whether a save or an evaluation comes before the next one, which is not recorded. Starting and writing take seconds."""
        if step + 1 in self.steps and self._profiler is None:
            self._start()
        if step not in self.steps and step + 1 not in self.steps:
            return
        self._close_ranges(0)
        if step == self.steps[-1]:
            self._finish()
        elif pauses:
            self._profiler.toggle_collection_dynamic(False, self.activities)
            self._off = True

    def _begin_step(self, step: int) -> None:
        if self._profiler is None:
            self._start()
        if self._off:
            self._profiler.toggle_collection_dynamic(True, self.activities)
            self._off = False
        self._recorded.append(step)
        self._open(f"step {step}")

    def _start(self) -> None:
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "99"
        )  # it would tell stderr that it starts and stops, and of GPUs that a CPU machine has not
        self._profiler = profile(activities=self.activities)
        self._profiler.start()
        for kind, parts in (("backbone", [self.module.backbone]), ("heads", heads(self.module))):
            for part in parts:
                self._hooks += [
                    part.register_forward_pre_hook(lambda *_, kind=kind: self._open(kind)),
                    part.register_forward_hook(lambda *_: self._close_ranges(2)),
                ]

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _open(self, name: str) -> None:
        self._ranges.append(record_function(name))
        self._ranges[-1].__enter__()

    def _close_ranges(self, left: int) -> None:
        while len(self._ranges) > left:
            self._ranges.pop().__exit__(None, None, None)

    def _finish(self) -> None:
        """Writes the trace, and on rank 0 the summary."""
        self.watch.at(self._recorded[-1], "saving")
        profiler, self._profiler = self._profiler, None
        self._unhook()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
        with unless_disk_full("the profile is not written"):
            make_folder(self.folder)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                plain = Path(scratch, "trace.json")
                profiler.export_chrome_trace(str(plain))
                text = plain.read_bytes()
            path = self.folder / f"rank{self.world.rank}.json.gz"
            with whole_file(path) as file, gzip.open(file, "wb", compresslevel=5) as packed:
                packed.write(text)
            if self.world.is_main:
                fewer = f" ({self.asked} were asked for)" if len(self._recorded) < self.asked else ""
                log.info(
                    "profile of steps %d to %d%s: %s (and one of each other rank) opens in https://ui.perfetto.dev\n%s",
                    self._recorded[0],
                    self._recorded[-1],
                    fewer,
                    path,
                    self._summarised(profiler, text),
                )

    def _summarised(self, profiler: profile, trace: bytes) -> str:
        """The table of the summary, which is written."""
        try:
            table = summarise(json.loads(trace))
        except (
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # some other torch may write it otherwise: no reason to end a training
            return f"but it cannot be summarised: {reason_of(error)}"
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        top = profiler.key_averages().table(sort_by=by, row_limit=15)
        with whole_file(self.folder / "summary.txt") as file:
            file.write(f"{table}\n\nOperations that took longest, by torch.profiler:\n\n{top}\n".encode())
        return table
