"""What trackers are told of a run, a server that does not serve, and one that serves wandb a little."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


@dataclass
class LittleServer:
    """As much of a wandb server as its client needs to keep one run. rows: of the run's history, by its client."""

    url: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.startswith("/upload/"):
            self.files.add(path.removeprefix("/upload/"))
            return {}
        said = json.loads(body or b"{}")
        if path != "/graphql":
            history = said.get("files", {}).get("wandb-history.jsonl", {})
            self.rows += [json.loads(line) for line in history.get("content", ())]
            return {"exitcode": None, "limits": {}}
        name = said.get("operationName", "")
        self.asked.append(name)
        project = {"id": "p", "name": "test", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            bucket = {"id": "r", "name": said["variables"]["name"], "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{file}"}
                for file in said["variables"]["files"]
            ]
            return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
        if name == "RunResumeStatus" and self.rows:
            return {"data": {"model": project | {"bucket": self._so_far(said["variables"]["name"])}}}
        return {"data": {}}

    def _so_far(self, name: str) -> dict[str, Any]:
        last = {"_step": self.rows[-1]["_step"], "_runtime": 1}
        return {
            "id": "r",
            "name": name,
            "historyLineCount": len(self.rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)]),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": {}}',
            "tags": [],
        }


@contextmanager
def little_server(little: LittleServer) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            answer = json.dumps(little.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_PUT = do_POST

        def log_message(self, *_: object) -> None:
            """Nothing on the console."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    little.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
