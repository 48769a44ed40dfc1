"""`launch/train.py --profile`: a torch.profiler trace of a few steps, a file per rank, and a summary of rank
0's.

In: where the training loop is. Out: WORK_DIR/profile/rank0.json.gz ... (Perfetto and chrome://tracing open
them) and summary.txt. Nothing here is collective, and nothing of the training changes: hooks that name ranges
are on the model while steps are recorded.
"""

import gzip
import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from internseg_ds.distributed.hang_verdict import Doing
from internseg_ds.distributed.process_group import World
from internseg_ds.distributed.watchdog import Watchdog
from internseg_ds.errors import ConfigError, reason_of
from internseg_ds.models.heads import heads
from internseg_ds.monitoring.trace_summary import summarise
from internseg_ds.output_files import make_folder, unless_disk_full, whole_file

log = logging.getLogger(__name__)

DEFAULT_STEPS = 3
# a profile is held in memory until it is written: some 0.1 GiB a step for the demo's model, more for those with
# more operations
MOST_STEPS = 20
# kernels are chosen and queues are filled in these
UNPROFILED = 4
"""Steps before the first one that is recorded."""


def check_profiled_steps(steps: int) -> int:
    """Raises ConfigError for a number of steps that cannot be profiled; 0 profiles none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= MOST_STEPS:
        raise ConfigError(
            f"--profile {steps} must be a whole number of steps from 1 to {MOST_STEPS}; {DEFAULT_STEPS} is "
            "the usual one"
        )
    return steps


class StepProfile:
    """One rank's profile of one training. A `with` block around the loop writes what was recorded when the
    loop ends early, by Ctrl-C too."""

    def __init__(
        self,
        folder: Path,
        steps: int,
        module: nn.Module,
        world: World,
        watch: Watchdog,
        *,
        start: int,
        last: int,
    ) -> None:
        """steps: how many are recorded; 0: none. module: the segmentor. start: the step that the run goes on
        from. last: the last one of the schedule."""
        self.folder = folder
        self.module = module
        self.world = world
        self.watch = watch
        self.asked = steps
        unprofiled = min(UNPROFILED, max(0, last - start - steps))  # none of a run that is too short
        self.steps = range(start + unprofiled + 1, min(start + unprofiled + steps, last) + 1)
        self.activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self.activities.append(ProfilerActivity.CUDA)
        self._profiler: profile | None = None
        self._recorded: list[int] = []
        self._paused = False
        self._ranges: list[record_function] = []
        """Open ones: of the step, of its part, and in a forward of the backbone or a head."""
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_ranges(0)
        profiler = self._profiler
        if profiler is not None:
            if self._recorded and (kind is None or issubclass(kind, KeyboardInterrupt)):
                self._finish(profiler)
            else:
                with suppress(RuntimeError):  # another error may have brought us here
                    profiler.stop()
        if self.asked and not self._recorded and kind is None:
            log.info(
                "there is no profile: %s",
                f"the run stopped before step {self.steps[0]}" if self.steps else "no step was left to train",
            )
        self._unhook()

    def at(self, step: int, doing: Doing, micro_batch: int = 0) -> None:
        """This rank has come to this part of this step; tells the watchdog, too."""
        self.watch.at(step, doing, micro_batch)
        if step not in self.steps:
            return
        if doing == "data" and micro_batch == 0:
            self._begin_step(step)
        self._close_ranges(1)
        self._open(doing)

    def end_step(self, step: int, *, pauses: bool) -> None:
        """This step is over. pauses: whether a save or an evaluation comes before the next one, which is not
        recorded. Starting and writing take seconds."""
        if step not in self.steps and step + 1 not in self.steps:
            return
        profiler = self._started()
        self._close_ranges(0)
        if step == self.steps[-1]:
            self._finish(profiler)
        elif pauses:
            profiler.toggle_collection_dynamic(False, self.activities)
            self._paused = True

    def _begin_step(self, step: int) -> None:
        profiler = self._started()
        if self._paused:
            profiler.toggle_collection_dynamic(True, self.activities)
            self._paused = False
        self._recorded.append(step)
        self._open(f"step {step}")

    def _started(self) -> profile:
        """The profiler, which is started when it is first needed."""
        if self._profiler is None:
            # else it reports on stderr that it starts and stops, and GPUs that a machine without any lacks
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._profiler = profile(activities=self.activities)
            self._profiler.start()
            self._name_ranges("backbone", self.module.get_submodule("backbone"))
            for head in heads(self.module):
                self._name_ranges("heads", head)
        return self._profiler

    def _name_ranges(self, name: str, part: nn.Module) -> None:
        """Forwards of this part are ranges inside that of the step's part."""
        self._hooks += [
            part.register_forward_pre_hook(lambda *_: self._open(name)),
            part.register_forward_hook(lambda *_: self._close_ranges(2)),
        ]

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _open(self, name: str) -> None:
        self._ranges.append(record_function(name))
        self._ranges[-1].__enter__()

    def _close_ranges(self, left: int) -> None:
        """Closes the innermost ranges until so many are left."""
        while len(self._ranges) > left:
            self._ranges.pop().__exit__(None, None, None)

    def _finish(self, profiler: profile) -> None:
        """Writes the trace, and on rank 0 the summary."""
        self.watch.at(self._recorded[-1], "saving")
        self._profiler = None
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
                    "profile of steps %d to %d%s: %s (and one of each other rank) opens in "
                    "https://ui.perfetto.dev\n%s",
                    self._recorded[0],
                    self._recorded[-1],
                    fewer,
                    path,
                    self._summarised(profiler, text),
                )

    def _summarised(self, profiler: profile, trace: bytes) -> str:
        """Writes the summary; its table. trace: the JSON text of the trace."""
        try:
            table = summarise(json.loads(trace))
        except (ValueError, KeyError, TypeError) as error:
            # some other torch may write traces otherwise: no reason to end a training
            return f"but it cannot be summarised: {reason_of(error)}"
        by = "self_device_time_total" if self.world.device.type == "cuda" else "self_cpu_time_total"
        top = profiler.key_averages().table(sort_by=by, row_limit=15)
        with whole_file(self.folder / "summary.txt") as file:
            file.write(f"{table}\n\nOperations that took longest, by torch.profiler:\n\n{top}\n".encode())
        return table
