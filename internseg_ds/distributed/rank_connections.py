"""Connections of every rank with rank 0, apart from the process group, for a thread that watches the
ranks."""

import logging
import os
import secrets
import socket
import struct
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from internseg_ds.distributed.hang_verdict import RankStatus
from internseg_ds.distributed.process_group import World, gather_from_ranks

log = logging.getLogger(__name__)

CONNECT_S = 60.0
"""Seconds in which a rank must have reached rank 0."""
SEND_TIMEOUT_S = 3
"""Seconds after which sending to a process that does not read fails."""


def connect_ranks(world: World, status: RankStatus) -> dict[Connection, RankStatus] | None:
    """The connections of this rank, each with the status of the rank at its other end: of rank 0 to all
    others, of any other rank to rank 0. None, on every rank and with a warning, where some rank cannot reach
    rank 0. Collective.

    status: of this rank.
    """
    key = secrets.token_bytes(16)
    reception = _Reception(world, key) if world.is_main else None
    address = os.environ.get("MASTER_ADDR", status.host)
    address, port, key = gather_from_ranks((address, reception.port if reception else 0, key))[0]
    peers = _reach_main(address, port, key, status) if reception is None else {}
    reached = gather_from_ranks(reception is not None or bool(peers))
    missing = [rank for rank, has_reached in enumerate(reached) if not has_reached]
    if reception is not None:
        if not missing:  # they are connected; their first messages may be on the way
            missing = reception.wait()
        peers = reception.close()
        if missing:
            log.warning(
                "rank %d cannot reach rank 0 at %s:%d (a firewall?), so nobody watches for dead and hanging "
                "ranks but the collectives' own time limit",
                missing[0],
                address,
                port,
            )
    return None if any(gather_from_ranks(bool(missing))) else peers


def _reach_main(address: str, port: int, key: bytes, status: RankStatus) -> dict[Connection, RankStatus]:
    """The connection with rank 0; none where it is not there after `CONNECT_S`."""
    found: dict[Connection, RankStatus] = {}

    def reach() -> None:
        with suppress(OSError, EOFError, AuthenticationError):
            connection = Client((address, port), authkey=key)
            connection.send(status)
            _limit_sending(connection)
            found[connection] = RankStatus(0, address, 0)

    # a thread of its own: a firewall that drops packets lets `Client` wait for minutes
    reaching = threading.Thread(target=reach, daemon=True)
    reaching.start()
    reaching.join(CONNECT_S)
    return dict(found)


class _Reception:
    """Rank 0 accepts the connections of the other ranks, in a thread."""

    def __init__(self, world: World, key: bytes) -> None:
        self._expected = set(range(1, world.size))
        self._peers: dict[Connection, RankStatus] = {}
        self._closed = threading.Event()
        self._listener = Listener(("0.0.0.0", 0), backlog=world.size, authkey=key)
        address: Any = self._listener.address
        self.port: int = address[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while len(self._peers) < len(self._expected) and not self._closed.is_set():
            with suppress(OSError, EOFError, AuthenticationError):  # closed, or not one of our ranks
                peer = self._listener.accept()
                status = peer.recv()
                _limit_sending(peer)
                self._peers[peer] = status

    def wait(self) -> list[int]:
        """Waits for all ranks, for at most `CONNECT_S`; returns those that are missing, in order."""
        deadline = time.monotonic() + CONNECT_S
        while len(self._peers) < len(self._expected) and time.monotonic() < deadline:
            time.sleep(0.01)
        return sorted(self._expected - {status.rank for status in list(self._peers.values())})

    def close(self) -> dict[Connection, RankStatus]:
        """The connections so far; accepts no more."""
        self._closed.set()
        self._listener.close()
        return dict(self._peers)


def _limit_sending(connection: Connection) -> None:
    """Makes sending to a peer that does not read fail after `SEND_TIMEOUT_S`, instead of waiting for ever."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
