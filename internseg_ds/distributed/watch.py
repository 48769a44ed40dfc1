"""Ranks that look after each other: when one dies or hangs, the others say so and end, instead of waiting in a collective for ever.

    rank r  --(where it stands, once a second)-->  rank 0  --(a request to stop; the end, and why)-->  all ranks

A rank that dies closes its connection, whatever killed it, so the others end within seconds. A hanging one is told from a slow one by a limit on the time
in which no rank gets on. Threads do all of it; the training only says where it stands, which writes to memory.
"""

import faulthandler
import logging
import os
import secrets
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client, Connection, Listener, wait

import torch.distributed as dist

from internseg_ds.distributed.hang_verdict import Doing, Place, line_of, verdict
from internseg_ds.distributed.process_group import World, join, leave, of_all_ranks
from internseg_ds.errors import ConfigError, Lost, UserError, of_one_rank, reason_of
from internseg_ds.exit_codes import FAILED, LOST, USER_ERROR
from internseg_ds.host_faults import told_in_a_sentence

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two signs of life."""
LEAST_HANG_S = 3 * BEAT_S
CONNECT_S = 60.0
GRACE_S = 3.0
"""Seconds in which a rank that fails may learn that another one's death was the reason."""

SLOW: tuple[Doing, ...] = ("building", "saving")
"""What waits for disks, and has a longer limit of its own."""


class Watch:
    """One rank's part in it. Made by all ranks together; a group of one looks after what waits for disks alone."""

    def __init__(self, world: World, *, hang_s: float, io_s: float = 0) -> None:
        """hang_s: seconds in which no rank gets on, or one gives no sign of life, that end the run; 0: any. io_s: the same while some rank builds, loads or
        saves. Nothing is timed while one is idle, which is up to who called. Collective."""
        self.world, self.hang_s, self.io_s = world, hang_s, io_s
        self.asked_to_stop = False
        """Whether some rank was asked to stop."""
        self._place = Place(world.rank, socket.gethostname(), os.getpid())
        self._got_on = time.monotonic()
        self._main = threading.get_ident()
        self._peers: dict[Connection, Place] = {}
        """By connection: of rank 0, where the other ranks stand; of another rank, where rank 0 does."""
        self._woken, self._wake = Pipe(duplex=False)
        self._unreachable = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size > 1 and self._connected():
            alive = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: (here := alive()) and here._disown())
            self._thread = threading.Thread(
                target=self._oversee if world.is_main else self._report, daemon=True, name="watch"
            )
        elif world.size == 1 and io_s:
            self._thread = threading.Thread(target=self._oversee, daemon=True, name="watch")
        if self._thread is not None:
            self._thread.start()

    def at(self, step: int, doing: Doing, micro_batch: int = 0) -> None:
        """This rank has come to this part of this step (the one after `step` - 1 updates). micro_batch: of the step, from 0."""
        self._place, self._got_on = (
            replace(
                self._place, step=step, doing=doing, micro_batch=micro_batch, marks=self._place.marks + 1
            ),
            time.monotonic(),
        )

    @contextmanager
    def during(self, step: int, doing: Doing) -> Iterator[None]:
        """This rank does this for the length of a block, and goes on with what it did before; after an error it goes on with nothing."""
        before = self._place.doing
        self.at(step, doing)
        yield
        self.at(step, before)

    def mark(self) -> None:
        """This rank gets on."""
        self._place, self._got_on = replace(self._place, marks=self._place.marks + 1), time.monotonic()

    def ask_to_stop(self) -> None:
        """This rank was asked to; the others hear of it."""
        self.asked_to_stop = True

    def announce(self, reason: str, code: int) -> None:
        """Before this process ends at once: the others hear the reason, and end with the same code. Returns when they have had the time to hear it."""
        if self._thread is not None:
            self._place = replace(self._place, failure=reason, code=code)
            time.sleep(2 * BEAT_S)

    def close(self, failure: BaseException | None = None) -> None:
        """Ends this rank's part. failure: what it fails with, alone as far as it knows. Should another rank's death be the reason, that ends the process;
        else the others hear of it when this process ends, after its traceback."""
        if self._thread is None:
            return
        if failure is None or self.world.size == 1:
            self._place = replace(self._place, left=True)
            self._wake.send(None)
            self._thread.join(GRACE_S)
            self._thread = None
            return
        self._place = replace(
            self._place,
            failure=reason_of(failure)[:300],
            code=USER_ERROR
            if isinstance(failure, UserError)
            else LOST
            if isinstance(failure, Lost)
            else FAILED,
        )
        time.sleep(GRACE_S)  # the thread speaks, and ends the process, where it knows better

    def _connected(self) -> bool:
        """Connects every rank with rank 0; where one cannot, nobody watches, and a warning says so. Collective."""
        key, listener = secrets.token_bytes(16), None
        if self.world.is_main:
            listener = Listener(("0.0.0.0", 0), backlog=self.world.size, authkey=key)
            threading.Thread(target=self._welcome, args=(listener,), daemon=True).start()
        address, port, key = of_all_ranks(
            (os.environ.get("MASTER_ADDR", self._place.host), listener and listener.address[1], key)
        )[0]
        reached = True
        if listener is None:
            reaching = threading.Thread(target=self._reach, args=(address, port, key), daemon=True)
            reaching.start()
            reaching.join(CONNECT_S)
            reached = bool(self._peers)
        cannot = [rank for rank, reaches in enumerate(of_all_ranks(reached)) if not reaches]
        if listener is not None:
            deadline = time.monotonic() + CONNECT_S
            while not cannot and len(self._peers) < self.world.size - 1 and time.monotonic() < deadline:
                time.sleep(0.01)
            if len(self._peers) < self.world.size - 1:
                cannot = cannot or [
                    min(set(range(1, self.world.size)) - {place.rank for place in self._peers.values()})
                ]
            self._unreachable.set()
            listener.close()
            if cannot:
                log.warning(
                    "rank %d cannot reach rank 0 at %s:%d (a firewall?), so nobody watches for dead and hanging ranks "
                    "but the collectives' own time limit",
                    cannot[0],
                    address,
                    port,
                )
        return not any(of_all_ranks(bool(cannot)))

    def _reach(self, address: str, port: int, key: bytes) -> None:
        with suppress(OSError, EOFError, AuthenticationError):
            to_main = Client((address, port), authkey=key)
            to_main.send(self._place)
            _drop_what_blocks(to_main)
            self._peers[to_main] = Place(0, address, 0)

    def _welcome(self, listener: Listener) -> None:
        while len(self._peers) < self.world.size - 1 and not self._unreachable.is_set():
            with suppress(OSError, EOFError, AuthenticationError):  # closed, or a stranger
                peer = listener.accept()
                place = peer.recv()
                _drop_what_blocks(peer)
                self._peers[peer] = place

    def _disown(self) -> None:
        """In a forked process (a data worker): a connection that it held open would hide this rank's death."""
        for peer in self._peers:
            peer.close()
        self._peers = {}

    def _here(self) -> Place:
        try:
            line, waits = line_of(self._main)
        except Exception:  # of frames that run on meanwhile: a line of text is no reason to watch no more
            line, waits = "", False
        return replace(
            self._place,
            line=line,
            waits=waits,
            stands_s=time.monotonic() - self._got_on,
            asked_to_stop=self.asked_to_stop,
        )

    def _report(self) -> None:
        """The thread of a rank that is not 0."""
        ((to_main, main),) = self._peers.items()
        heard, failed_first = time.monotonic(), False
        try:
            while True:
                if to_main in wait([to_main, self._woken], BEAT_S):
                    word, about, main = to_main.recv()
                    heard = time.monotonic()
                    failed_first |= bool(main.failure and not self._place.failure)
                    self.asked_to_stop |= main.asked_to_stop
                    if word:
                        self._end(word, about)
                    if main.left:
                        return
                to_main.send(self._here())
                if self._place.left:
                    return
                if self.hang_s and time.monotonic() - heard > self.hang_s:
                    self._end(f"{main} has given no sign of life for {self.hang_s:.0f} s", main)
        except (OSError, EOFError):
            if not self._place.left and (not main.failure or failed_first):
                self._end(main.fate, main)

    def _oversee(self) -> None:
        """The thread of rank 0."""
        got_on = beat = time.monotonic()
        heard, marks = dict.fromkeys(self._peers, got_on), -1
        failed_first: set[Connection] = (
            set()
        )  # before this rank: a failure of all at once speaks for itself, by its own traceback on each
        while True:
            for peer in wait([*self._peers, self._woken], BEAT_S):
                if peer is self._woken:
                    continue
                try:
                    self._peers[peer] = place = peer.recv()
                    heard[peer] = time.monotonic()
                    self.asked_to_stop |= place.asked_to_stop
                    if place.failure and not self._place.failure:
                        failed_first.add(peer)
                except (OSError, EOFError):
                    place = self._peers.pop(peer)
                    if not place.left and (not place.failure or peer in failed_first):
                        self._tell(place.fate, place)
            now, here = time.monotonic(), self._here()
            if here.left:
                self._send("", here)
                return
            everybody = [here, *self._peers.values()]
            limit = self._limit({place.doing for place in everybody})
            if (
                (seen := sum(place.marks for place in everybody)) != marks
                or not limit
                or any(place.left for place in everybody)
            ):
                marks, got_on = seen, now
            if self.hang_s:
                for peer, place in self._peers.items():
                    if now - heard[peer] > self.hang_s and not place.left:
                        self._tell(
                            f"{place} has given no sign of life for {self.hang_s:.0f} s: its process is stopped, or its host is down",
                            place,
                        )
            if limit and now - got_on > limit:
                self._tell(*verdict(everybody, limit))
            if now - beat >= BEAT_S:
                beat = now
                self._send("", here)

    def _limit(self, doing: Set[Doing]) -> float:
        """Seconds in which some rank must get on while all are at these; 0: any."""
        if "idle" in doing:
            return 0
        if doing & set(SLOW):
            return self.io_s
        return self.hang_s if self.world.size > 1 else 0  # one alone may stand in a debugger

    def _tell(self, word: str, about: Place) -> None:
        """The end for all ranks."""
        self._send(word, about)
        self._end(word, about)

    def _send(self, word: str, about: Place) -> None:
        for peer in self._peers:
            with suppress(OSError):  # a death is noticed when it is listened for
                peer.send((word, about, self._here()))

    def _end(self, word: str, about: Place) -> None:
        """Ends this process, whose main thread may be in a collective that never returns."""
        if about.rank == self.world.rank:
            faulthandler.dump_traceback(file=sys.__stderr__)
        if self.world.local_rank == 0 or about.rank == 0:
            log.error("%s. This run ends; start it again with --resume auto.", word)
        os._exit(about.code)


@contextmanager
def joined(world: World) -> Iterator[World]:
    """The process group of `world`, whose ranks watch each other, for the length of a `with` block. Collective: returns once all processes have come.

    A group that exists already (a notebook, another library) is used and left as it is.
    """
    owned = not dist.is_initialized()
    if owned:
        join(world)
    try:
        watch = Watch(world, hang_s=0)
        try:
            with told_in_a_sentence():
                yield world
        except BaseException as error:
            watch.close(of_one_rank(error))
            raise
        dist.barrier()
        watch.close()
    finally:
        if owned:
            leave()


@contextmanager
def time_limit(seconds: float, doing: str) -> Iterator[None]:
    """Ends this process, with its stack, where a block takes longer: for what comes before ranks can watch each other. 0: any time."""

    def end() -> None:
        faulthandler.dump_traceback(file=sys.__stderr__)
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
    """Raises ConfigError for one that healthy ranks would exceed, or that is no time."""
    if not (seconds == 0 or LEAST_HANG_S <= seconds < float("inf")):
        raise ConfigError(
            f"--heartbeat-timeout {seconds:g} must be at least {LEAST_HANG_S:g} seconds, or 0 for no limit; 600 is the usual one"
        )


def _drop_what_blocks(peer: Connection) -> None:
    """Sends to a peer that does not read fail after a while, in the place of waiting for ever."""
    with socket.socket(fileno=os.dup(peer.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(GRACE_S), 0))
