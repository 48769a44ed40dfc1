"""The page served until Ctrl-C."""

import errno
import socket
from typing import Any

from internseg_ds.errors import ConfigError


def listening(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0 takes any. Raises ConfigError for an address that cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "another program listens there" if taken else error.strerror
        raise ConfigError(
            f"--host {host} --port {port}: {reason}; give another one{', or --port 0 for any' * taken}"
        ) from error


def address_of(bound: socket.socket) -> str:
    """What to write into a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def server_of(application: Any) -> Any:
    """A uvicorn.Server; `run(sockets=[...])` returns when the process is asked to end, or `should_exit` is set."""
    import uvicorn

    # a page that is open keeps its connection, which nobody is to wait for
    return uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))
