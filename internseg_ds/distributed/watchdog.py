"""A watchdog for the ranks: when one dies or hangs, the others report it and end, instead of waiting in a
collective for ever.

    rank r --(its status, once a second)--> rank 0 --(its status; a request to stop; the end and why)--> all

A rank that dies closes its connection, whatever killed it, so the others end within seconds. A hanging rank
is told from a slow one by a limit on the time in which no rank makes progress. Threads do all of it; the
training only reports where it stands, which writes to memory.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Never

import torch.distributed as dist

from internseg_ds.distributed.hang_verdict import Doing, RankStatus, line_of, verdict
from internseg_ds.distributed.process_group import World, join, leave
from internseg_ds.distributed.rank_connections import connect_ranks
from internseg_ds.errors import ConfigError, Lost, UserError, reason_of, unless_on_every_rank
from internseg_ds.exit_codes import FAILED, LOST, USER_ERROR
from internseg_ds.host_faults import explained, host_errors_explained

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two signs of life."""
LEAST_HANG_S = 3 * BEAT_S
GRACE_S = 3.0
"""Seconds in which a rank that fails may learn that another rank's death was the reason."""

SLOW: tuple[Doing, ...] = ("building", "saving")
"""What waits for disks, and has a longer limit of its own."""


class Watchdog:
    """One rank's part of the watchdog. Made by all ranks together. A group of one only limits what waits for
    disks.

    Attributes: asked_to_stop (whether any rank was asked to stop).
    """

    def __init__(self, world: World, *, hang_s: float, io_s: float = 0) -> None:
        """hang_s: seconds without progress of any rank, or without a sign of life of one, that end the run;
        0: no limit. io_s: the limit of the time without progress while any rank builds, loads or saves. There
        is no limit while any rank is idle, that is, while the caller of this library does something else.
        Collective."""
        self.world = world
        self.hang_s = hang_s
        self.io_s = io_s
        self.asked_to_stop = False
        self._status = RankStatus(world.rank, socket.gethostname(), os.getpid())
        self._progress_at = time.monotonic()
        self._main_thread = threading.get_ident()
        self._woken, self._wake = Pipe(duplex=False)
        self._peers: dict[Connection, RankStatus] = {}
        self._thread: threading.Thread | None = None
        if world.size > 1:
            if (peers := connect_ranks(world, self._status)) is not None:
                self._peers = peers
                self._close_connections_in_forks()
                self._start(_Overseer(self) if world.is_main else _Reporter(self))
        elif io_s:
            self._start(_Overseer(self))

    def _start(self, watcher: "_Overseer | _Reporter") -> None:
        self._thread = threading.Thread(target=watcher.run, daemon=True, name="watch")
        self._thread.start()

    def _close_connections_in_forks(self) -> None:
        """In forked processes (data workers): a connection that they kept open would hide this rank's
        death."""
        reference = weakref.ref(self)

        def close() -> None:
            if (watchdog := reference()) is not None:
                for peer in watchdog._peers:
                    peer.close()
                watchdog._peers.clear()

        os.register_at_fork(after_in_child=close)

    def at(self, step: int, doing: Doing, micro_batch: int = 0) -> None:
        """This rank has come to this part of this step (the one after `step` - 1 updates). micro_batch: of
        the step, from 0."""
        self._progress(step=step, doing=doing, micro_batch=micro_batch)

    @contextmanager
    def during(self, step: int, doing: Doing) -> Iterator[None]:
        """This rank does this inside the block, and afterwards what it did before; after an error, its status
        stays as it is."""
        before = self._status.doing
        self.at(step, doing)
        yield
        self.at(step, before)

    def mark(self) -> None:
        """This rank makes progress."""
        self._progress()

    def _progress(self, **changes: Any) -> None:
        self._status = replace(self._status, marks=self._status.marks + 1, **changes)
        self._progress_at = time.monotonic()

    def ask_to_stop(self) -> None:
        """This rank was asked to stop; the others get to know it."""
        self.asked_to_stop = True

    def announce(self, reason: str, code: int) -> None:
        """Reports the reason for which this process is about to end at once; the others end with the same
        exit code. Returns after they have had the time to receive it."""
        if self._thread is not None:
            self._status = replace(self._status, failure=reason, code=code)
            time.sleep(2 * BEAT_S)

    def close(self, failure: BaseException | None = None) -> None:
        """Ends this rank's part.

        failure: the error that this rank ends with, if any. If another rank's death is its reason, this ends
        the process; otherwise the others report the error once this process has ended, after its traceback.
        """
        if self._thread is None:
            return
        if failure is None or self.world.size == 1:
            self._status = replace(self._status, left=True)
            self._wake.send(None)
            self._thread.join(GRACE_S)
            self._thread = None
            return
        failure = explained(failure)  # which this process will end with
        self._status = replace(self._status, failure=reason_of(failure)[:300], code=_exit_code(failure))
        # meanwhile the thread sends it, or ends the process if another rank is the reason
        time.sleep(GRACE_S)

    def status(self) -> RankStatus:
        """Where this rank stands now."""
        try:
            line, waits = line_of(self._main_thread)
        except Exception:  # the frames change meanwhile, and watching must go on without their text
            line, waits = "", False
        return replace(
            self._status,
            line=line,
            waits=waits,
            stands_s=time.monotonic() - self._progress_at,
            asked_to_stop=self.asked_to_stop,
        )

    def has_failed(self) -> bool:
        return bool(self._status.failure)

    def has_left(self) -> bool:
        return self._status.left

    def end(self, reason: str, about: RankStatus) -> Never:
        """Ends this process, whose main thread may be in a collective that never returns.

        reason: a sentence for the log. about: the rank at fault.
        """
        if about.rank == self.world.rank:
            _dump_stacks()
        if self.world.local_rank == 0 or about.rank == 0:
            log.error("%s. This run ends; start it again with --resume auto.", reason)
        os._exit(about.code)


@dataclass(frozen=True)
class _News:
    """What rank 0 sends. main: its status. reason: why the run ends now, about: the rank at fault; "" if it
    goes on."""

    main: RankStatus
    reason: str
    about: RankStatus


class _Reporter:
    """The thread of any rank but 0: sends its status to rank 0, and ends the process when rank 0 says so or
    is gone."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        ((self._to_main, self._main),) = watchdog._peers.items()
        self._heard_at = time.monotonic()
        # rank 0 failed before this rank did. If all fail at once, each one's own traceback tells why
        self._main_failed_first = False

    def run(self) -> None:
        watchdog = self._watchdog
        try:
            while self._exchange():
                pass
        except (OSError, EOFError):  # the connection is closed
            if not watchdog.has_left() and (not self._main.failure or self._main_failed_first):
                watchdog.end(self._main.fate, self._main)

    def _exchange(self) -> bool:
        """Receives what is there, or waits for a beat, and sends the status; whether to go on."""
        watchdog = self._watchdog
        if self._to_main in wait([self._to_main, watchdog._woken], BEAT_S):
            self._receive()
            if self._main.left:
                return False
        self._to_main.send(watchdog.status())
        if watchdog.has_left():
            return False
        if watchdog.hang_s and time.monotonic() - self._heard_at > watchdog.hang_s:
            watchdog.end(f"{self._main} has given no sign of life for {watchdog.hang_s:.0f} s", self._main)
        return True

    def _receive(self) -> None:
        news: _News = self._to_main.recv()
        self._main = news.main
        self._heard_at = time.monotonic()
        if news.main.failure and not self._watchdog.has_failed():
            self._main_failed_first = True
        if news.main.asked_to_stop:
            self._watchdog.asked_to_stop = True
        if news.reason:
            self._watchdog.end(news.reason, news.about)


class _Overseer:
    """The thread of rank 0: receives the status of all ranks, and ends the run when one dies or none makes
    progress."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._peers = watchdog._peers
        now = time.monotonic()
        self._sent_at = now
        self._heard_at = dict.fromkeys(self._peers, now)
        self._marks = -1
        """Of all ranks together, at `_progress_at`."""
        self._progress_at = now
        # failed before rank 0 did. If all fail at once, each one's own traceback tells why
        self._failed_first: set[Connection] = set()

    def run(self) -> None:
        while True:
            ready = wait([*self._peers, self._watchdog._woken], BEAT_S)
            for peer in [peer for peer in self._peers if peer in ready]:
                self._receive(peer)
            here = self._watchdog.status()
            if here.left:
                self._send("", here)
                return
            self._check_signs_of_life()
            self._check_progress([here, *self._peers.values()])
            if time.monotonic() - self._sent_at >= BEAT_S:
                self._sent_at = time.monotonic()
                self._send("", here)

    def _receive(self, peer: Connection) -> None:
        try:
            status: RankStatus = peer.recv()
        except (OSError, EOFError):  # the connection is closed
            status = self._peers.pop(peer)
            if not status.left and (not status.failure or peer in self._failed_first):
                self._end_all(status.fate, status)
            return
        self._peers[peer] = status
        self._heard_at[peer] = time.monotonic()
        if status.asked_to_stop:
            self._watchdog.asked_to_stop = True
        if status.failure and not self._watchdog.has_failed():
            self._failed_first.add(peer)

    def _check_signs_of_life(self) -> None:
        limit = self._watchdog.hang_s
        for peer, status in self._peers.items():
            if limit and time.monotonic() - self._heard_at[peer] > limit and not status.left:
                self._end_all(
                    f"{status} has given no sign of life for {limit:.0f} s: its process is stopped, or its "
                    "host is down",
                    status,
                )

    def _check_progress(self, everybody: list[RankStatus]) -> None:
        limit = self._limit({status.doing for status in everybody})
        marks = sum(status.marks for status in everybody)
        now = time.monotonic()
        if marks != self._marks or not limit or any(status.left for status in everybody):
            self._marks = marks
            self._progress_at = now
        elif now - self._progress_at > limit:
            self._end_all(*verdict(everybody, limit))

    def _limit(self, doing: Set[Doing]) -> float:
        """Seconds in which some rank must make progress while they do these; 0: no limit."""
        if "idle" in doing:
            return 0
        if doing & set(SLOW):
            return self._watchdog.io_s
        # one process alone may stand in a debugger
        return self._watchdog.hang_s if self._watchdog.world.size > 1 else 0

    def _end_all(self, reason: str, about: RankStatus) -> Never:
        self._send(reason, about)
        self._watchdog.end(reason, about)

    def _send(self, reason: str, about: RankStatus) -> None:
        for peer in self._peers:
            with suppress(OSError):  # a dead rank is noticed when its status is received
                peer.send(_News(self._watchdog.status(), reason, about))


def _exit_code(failure: BaseException) -> int:
    if isinstance(failure, UserError):
        return USER_ERROR
    return LOST if isinstance(failure, Lost) else FAILED


def _dump_stacks() -> None:
    """Writes the stacks of all threads to stderr."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback(file=sys.__stderr__)


@contextmanager
def joined(world: World) -> Iterator[World]:
    """The process group of `world`, with a watchdog, for the length of a `with` block. Collective: returns
    once all processes have come.

    A group that exists already (a notebook, another library) is used and left as it is.
    """
    owned = not dist.is_initialized()
    if owned:
        join(world)
    try:
        watchdog = Watchdog(world, hang_s=0)
        try:
            with host_errors_explained():
                yield world
        except BaseException as error:
            watchdog.close(unless_on_every_rank(error))
            raise
        dist.barrier()
        watchdog.close()
    finally:
        if owned:
            leave()


@contextmanager
def time_limit(seconds: float, doing: str) -> Iterator[None]:
    """Ends this process, with its stacks, if a block takes longer: for what comes before there is a watchdog.

    seconds: 0 for no limit. doing: the subject of the error message.
    """

    def end() -> None:
        _dump_stacks()
        log.error(
            "%s took more than %.0f s (engine.io_timeout): a disk that does not answer? This run ends.",
            doing,
            seconds,
        )
        os._exit(LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_heartbeat_timeout(seconds: float) -> None:
    """Raises ConfigError for a limit that healthy ranks would exceed, or that is no time."""
    if not (seconds == 0 or LEAST_HANG_S <= seconds < float("inf")):
        raise ConfigError(
            f"--heartbeat-timeout {seconds:g} must be at least {LEAST_HANG_S:g} seconds, or 0 for no "
            "limit; 600 is the usual one"
        )
