"""A folder uploaded to a stand-in of the hub: a server of this machine that answers as the hub does."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from internseg_ds.errors import ConfigError
from internseg_ds.evaluation.hub import check_repository
from tests.conftest import ROOT

UPLOAD = """
import sys
from pathlib import Path
from internseg_ds.errors import UserError
from internseg_ds.evaluation.hub import push_to_hub
try:
    print(push_to_hub(Path(sys.argv[1]), sys.argv[2]))
except UserError as error:
    print(type(error).__name__, error)
"""


class Hub(ThreadingHTTPServer):
    """Keeps what is uploaded to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/somebody/scenes", "name": "somebody/scenes"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path == "/api/models/somebody/scenes/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/somebody/scenes/commit/1234"
            self.answer({"success": True, "commitOid": "1234", "commitUrl": url})
        else:  # of YAML, say, which is checked before
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"error": "Entry not found"}, 404)

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("token", ["hf_right", "hf_wrong"])
def test_a_folder_is_uploaded_whole_or_the_user_is_told(token, hub, tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    contents = {"config.json": b"{}", "README.md": b"# scenes\n", "model.safetensors": bytes(range(256))}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", UPLOAD, folder, "somebody/scenes"],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if token == "hf_right":
        assert done.stdout.strip() == f"{hub.address}/somebody/scenes/commit/1234", done.stdout + done.stderr
        assert hub.files == contents
        assert [repo.get("visibility") for repo in hub.created] == ["private"]
    else:
        assert done.stdout.startswith("OutputError") and "hf auth login" in done.stdout, (
            done.stdout + done.stderr
        )
        assert hub.files == {}


def test_a_name_that_is_none_is_refused_before_anything_is_written():
    with pytest.raises(ConfigError, match=r"--push-to-hub a/b/c: .*write OWNER/NAME"):
        check_repository("a/b/c")
