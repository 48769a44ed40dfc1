"""What trackers are told of a run, and a server that does not serve."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from internseg_ds.monitoring.trackers.tracker import RunInfo


def run_info(work_dir: Path, start: int = 0, run: str = "0123abcd") -> RunInfo:
    return RunInfo(
        run=run,
        name=work_dir.name,
        work_dir=work_dir,
        start=start,
        config={"model": {"depth": 3}, "optimizer": {"lr": 1e-3}},
        ds_config={"bf16": {"enabled": True}},
        environment=["internseg_ds 0.1 (git abc)", "command: train"],
    )


class _Refuses(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@contextmanager
def bad_server(kind: str) -> Iterator[str]:
    """The URL of a server that "refuses" connections, "hangs" (takes them and says nothing), or answers "500"."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if kind == "refuses":
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"  # bound, and nobody listens
        elif kind == "hangs":
            listening.listen(64)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        else:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()
            server.server_close()
