"""`launch/show.py` as users start it."""

import os
import select
import signal
import socket
import subprocess
import sys

import pytest

from tests.browser import watched
from tests.conftest import ROOT

pytest.importorskip("gradio")


@pytest.mark.slow
def test_it_serves_until_ctrl_c_asks_no_other_host_and_leaves_nothing(browser, weights, ade20k, tmp_path):
    file = min((ade20k / "images/validation").glob("*.jpg"))
    # where all that is asked of other hosts would come, gradio's notices of use too
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy")
        env = dict.fromkeys([*names, *map(str.upper, names)], address)
        running = subprocess.Popen(
            [sys.executable, "launch/show.py", str(weights), "--port", "0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **env, "TMPDIR": str(tmp_path), "no_proxy": "", "NO_PROXY": ""},
        )
        try:
            page = running.stdout.readline().split()[0]
            with watched(browser) as seen:
                seen.page.goto(page)
                seen.page.set_input_files("input[type=file]", file)
                seen.page.locator("#view .summary", has_text=file.name).wait_for(state="visible")
                assert seen.outside(page) == [] and seen.errors == []
            assert list(tmp_path.rglob(file.name))
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
        finally:
            running.kill()
        assert not select.select([proxy], [], [], 0)[0]
    assert not list(tmp_path.glob("internseg_show_*"))


def test_a_port_that_is_taken_ends_with_one_error(launch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = launch("launch/show.py", tmp_path, "--port", port, processes=1, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert f"--port {port}: another program listens there" in done.stderr
