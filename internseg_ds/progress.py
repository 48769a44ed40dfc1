"""What a command is doing while nothing else is to be seen: stages, and counts of what is done, on rank 0.

On a terminal: rows at its foot with the time that has passed, a bar and the time that is left; lines of the log
come above them, whole. Elsewhere: lines of the log. Loads nothing but the standard library until a terminal
shows a row, so that a command can speak before it imports anything.
"""

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO, TypeVar, cast

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)
T = TypeVar("T")

BYTES = "bytes"
"""The unit that is shown in GiB, or in MiB where that is less than one."""
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Variables in which launchers give a process its rank; `distributed.process_group`, which loads torch, reads
them with care."""
OFTEN_S = 30.0
"""Seconds between two lines about one count, where there is no terminal."""
LONG_S = 3.0
"""A stage that took so many seconds says at its end how long."""
REDRAWN_S = 0.25
"""Seconds between two pictures of a terminal's rows."""


def is_main() -> bool:
    """Whether this process is the one that speaks: rank 0, by its launcher's variables."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def on_terminal() -> bool:
    """Whether rows can be drawn: stderr is a terminal that can move its cursor."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def say(line: str) -> None:
    """Writes a line to stderr, above the rows if there are any."""
    rows = _rows() if _rows.cache_info().currsize else None
    if rows is None or not rows.say(line):
        console = _Stderr()
        console.write(line + "\n")
        console.flush()


@contextmanager
def stage(doing: str, *, after_s: float = 0.0) -> Iterator[None]:
    """Around something that can take long. after_s: where there is no terminal, it is named once it has taken so
    many seconds: 0 for what happens once, more for what happens often and is mostly quick."""
    with progress(doing, None, after_s=after_s):
        yield


class Count:
    """How much is done of something. total: None where that is not known."""

    def __init__(self, doing: str, total: int | None, unit: str, note: Callable[[], str]) -> None:
        self.doing, self.total, self.unit = doing, total, unit
        self.done = 0
        self._note = note
        self._began = self._said = time.monotonic()
        self._row: TaskID | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._row is not None:
            _rows().show(self)
        elif time.monotonic() - self._said >= OFTEN_S and is_main():
            self._said = time.monotonic()
            _log(f"{self.doing}: {self.state()}")

    def state(self) -> str:
        """ "120 of 2,000 images, 3.1 images/s, 0:10:05 left"."""
        rate = self.done / self.seconds if self.seconds else 0.0
        per_s = f"{_amount(rate, self.unit)}/s" if self.unit == BYTES else f"{rate:.3g} {self.unit}/s"
        words = [self.counted(), per_s.replace(" /", "/")]
        if rate and self.total is not None:
            words.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join([*words, *filter(None, [self._note()])])

    def counted(self) -> str:
        """ "120 of 2,000 images"; "" of a stage."""
        if self.total is None:
            return ""
        if self.unit == BYTES:
            total = _amount(self.total, BYTES)
            return f"{_amount(self.done, BYTES, like=self.total).split()[0]} of {total}"
        return f"{self.done:,} of {self.total:,}{f' {self.unit}' if self.unit else ''}"


@contextmanager
def progress(
    doing: str,
    total: int | None,
    unit: str = "",
    *,
    note: Callable[[], str] = lambda: "",
    after_s: float = 2.0,
) -> Iterator[Count]:
    """Around a count: call its `advance`. On ranks other than 0 nothing is shown.

    unit: in the plural ("images"), or BYTES. note: what else to show; asked for when something is shown. after_s:
    as of `stage`.
    """
    count = Count(doing, total, unit, note)
    if not is_main() or not _is_heard():
        yield count
        return
    if on_terminal():
        rows = _rows()
        count._row = rows.add(doing, total)
        try:
            yield count
        finally:
            rows.remove(count._row)
    else:
        named = threading.Timer(after_s, _log, [_opening(count)])
        if after_s:
            named.start()
        else:
            _log(_opening(count))
        try:
            yield count
        finally:
            named.cancel()
    if count.seconds >= LONG_S:
        _log(f"{doing}: {duration(count.seconds)}")


def tracked(
    items: Iterable[T], doing: str, total: int, unit: str = "", *, after_s: float = 2.0
) -> Iterator[T]:
    """The items, counted as they are taken."""
    with progress(doing, total, unit, after_s=after_s) as count:
        for item in items:
            yield item
            count.advance()


def duration(seconds: float) -> str:
    """ "4.2 s", "0:03:20", "2 days, 3:00:00"."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _amount(value: float, unit: str, like: float | None = None) -> str:
    """like: an amount whose unit it is to have, other than its own."""
    if unit != BYTES:
        return f"{value:,.0f}"
    large = (value if like is None else like) >= 2**30
    return f"{value / 2**30:.2f} GiB" if large else f"{value / 2**20:.1f} MiB"


def _opening(count: Count) -> str:
    what = "" if count.total is None else f": {count.counted().split(' of ')[1]}"
    return f"{count.doing}{what} ..."


def _is_heard() -> bool:
    return not _is_logged() or log.isEnabledFor(logging.INFO)


def _is_logged() -> bool:
    """Whether a command or a run has started the log of this package."""
    return bool(logging.getLogger(__name__.partition(".")[0]).handlers)


def _log(line: str) -> None:
    if _is_logged():
        log.info("%s", line)
    else:
        say(line)


class _Stderr:
    """stderr as it is now. It may be gone, with a terminal or the reader of a pipe, or closed from the start (None):
    no reason to end a run."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.cache
def _rows() -> "_Rows":
    return _Rows()


class _Rows:
    """The rows at the foot of the terminal, drawn by a thread while there are any.

    One lock is held around everything that rich does, and around each fork, so that no child has one that is
    held for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._shown: Progress | None = None
        self._counts = 0
        self._gone = threading.Event()
        os.register_at_fork(
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._lock.release,
        )

    def add(self, doing: str, total: int | None) -> "TaskID":
        with self._lock:
            if self._shown is None:
                self._shown = _drawn()
                self._shown.start()
                self._gone = threading.Event()
                threading.Thread(target=self._redraw, args=(self._gone,), daemon=True).start()
            self._counts += 1
            row = self._shown.add_task(doing, total=total, state="")
            self._shown.refresh()
            return row

    def show(self, count: Count) -> None:
        with self._lock:
            if self._shown is None or count._row is None or os.getpid() != self._owner:
                return
            more: dict[str, Any] = {}
            if time.monotonic() - count._said >= REDRAWN_S:
                count._said = time.monotonic()
                more["state"] = count.state()
            self._shown.update(count._row, completed=count.done, **more)

    def remove(self, row: "TaskID") -> None:
        with self._lock:
            if self._shown is None or os.getpid() != self._owner:
                return
            self._shown.remove_task(row)
            self._counts -= 1
            if self._counts == 0:
                self._gone.set()
                self._shown.stop()
                self._shown = None

    def say(self, line: str) -> bool:
        """Whether there are rows, and so the line was written above them."""
        if os.getpid() != self._owner:
            return False
        with self._lock:
            if self._shown is None:
                return False
            self._shown.console.print(line, markup=False, highlight=False, soft_wrap=True)
            return True

    def _redraw(self, gone: threading.Event) -> None:
        while not gone.wait(REDRAWN_S):
            with self._lock:
                if self._shown is not None and not gone.is_set():
                    self._shown.refresh()


def _drawn() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    class VisibleCursor(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False  # a process that is killed could not show it again

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=len("0:00:00"))),
        console=VisibleCursor(file=cast(TextIO, _Stderr())),
        auto_refresh=False,
        transient=True,
    )
