"""TensorBoard: a run's records, pictures and settings in WORK_DIR/tensorboard."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from internseg_ds.monitoring.evaluation_record import EvaluationRecord
from internseg_ds.monitoring.trackers.best import Best
from internseg_ds.monitoring.trackers.pictures import class_rows, confusion_picture, panels, sent_pictures
from internseg_ds.monitoring.trackers.tracker import RunInfo
from internseg_ds.monitoring.units import in_cell
from internseg_ds.output_files import unless_disk_full

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ROOM_FOR_EVENTS = 2**16
"""Bytes that must be free before a record is given to TensorBoard."""
PICTURES = 4

Write = Callable[["SummaryWriter"], None]


class TensorBoardTracker:
    """Event files in one folder. After a write that failed, as on a full disk, what is not there yet goes into a new
    file with the next record; pictures do not wait."""

    name = "TensorBoard"

    def __init__(self, folder: Path | None) -> None:
        """folder: None for WORK_DIR/tensorboard."""
        # here, in the main thread: processes are forked while the tracker's works
        import torch.utils.tensorboard  # noqa: F401

        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._waiting: list[Write] = []
        self._purge: int | None = None
        """The first step of the run, whose later events of an earlier file TensorBoard shall not show."""

    def start(self, info: RunInfo) -> None:
        self._folder = self._folder or info.work_dir / "tensorboard"
        self._purge = info.start + 1 if info.start else None
        config = json.dumps(info.config, indent=2, default=str)
        ds_config = json.dumps(info.ds_config, indent=2, default=str)
        for name, text in (
            ("config", config),
            ("ds_config", ds_config),
            ("run", "\n".join(info.environment)),
        ):
            self._add("the config", info.start, _text(f"settings/{name}", text, info.start))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        moment = time.time()

        def write(writer: "SummaryWriter") -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step, moment)

        self._add("a record", step, write)

    def evaluation(self, evaluation: EvaluationRecord, best: Best | None) -> None:
        with unless_disk_full(f"TensorBoard lacks the pictures of step {evaluation.step}"):
            self._write_waiting()  # where there is no room for records, there is none for pictures
            self._waiting = [lambda writer: _show(writer, evaluation, best)]
            self._write_waiting()

    def checkpoint(self, step: int, folder: Path) -> None:
        """Nothing: event files hold none."""

    def close(self, *, failed: bool) -> None:
        if self._waiting:
            with unless_disk_full("TensorBoard lacks the last records"):
                self._write_waiting()
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        """Nothing: what is not written in time is lost."""

    def _add(self, what: str, step: int, write: Write) -> None:
        self._waiting.append(write)
        with unless_disk_full(f"{what} of step {step} is not written yet"):
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Raises OSError where some have to wait."""
        assert self._folder is not None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < ROOM_FOR_EVENTS:
                # before the writer's thread meets the full disk, and prints a traceback
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._writer is None:
                self._writer = self._opened(self._folder)
            for write in self._waiting:
                write(self._writer)
            self._writer.flush()  # raises what its thread ran into
        except OSError:
            self._writer = None  # a writer that has failed raises the same error for ever
            raise
        self._waiting = []

    def _opened(self, folder: Path) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=self._purge)
        self._purge = None  # of the run's first file only
        return writer


def _text(name: str, text: str, step: int) -> Write:
    code = "".join(f"    {line}\n" for line in text.splitlines())  # as Markdown has it
    return lambda writer: writer.add_text(name, code, step)


def _show(writer: "SummaryWriter", evaluation: EvaluationRecord, best: Best | None) -> None:
    step, moment = evaluation.step, evaluation.time
    for shown in sent_pictures(evaluation, PICTURES):
        picture = panels(shown, evaluation.palette)
        writer.add_image(f"validation/{shown.name}", picture, step, moment, dataformats="HWC")
    writer.add_image("evaluation/confusion", confusion_picture(evaluation), step, moment, dataformats="HWC")
    rows = [
        f"| {in_cell(name)} | {'' if iou is None else f'{iou:.2f}'} | {pixels:,} |"
        for name, iou, pixels in class_rows(evaluation)
    ]
    table = "\n".join(["| class | IoU, % | pixels |", "|---|---|---|", *rows])
    writer.add_text("evaluation/classes", table, step, moment)
    if best is not None:
        writer.add_scalar(f"best/{best.name}", best.value, step, moment)
