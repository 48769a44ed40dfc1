import os
import pty
import re
import subprocess
import sys
import time

import pytest

from internseg_ds import progress

COUNTS = """
import logging, sys, time
from internseg_ds.monitoring.run_log import begin_log
begin_log()
from internseg_ds.progress import stage, progress
log = logging.getLogger("internseg_ds.somewhere")
with stage("building"), progress("reading", 40, "images", note=lambda: "mIoU 12.00 %") as done:
    for number in range(40):
        time.sleep(0.02)
        done.advance()
        if number % 4 == 0:
            log.info("line %d %s end", number, "x" * 150)
assert "torch" not in sys.modules
"""
LINE = re.compile(rf"\d\d:\d\d:\d\d line (\d+) {'x' * 150} end")


def on_a_terminal(code: str) -> str:
    """What a script writes to a terminal of 80 columns, without the codes that move its cursor."""
    main, other = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=other, stderr=other, env=env)
    os.close(other)
    said = b""
    try:
        while piece := os.read(main, 65536):
            said += piece
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0, said
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode())


def test_on_a_terminal_rows_are_drawn_below_lines_of_the_log_that_stay_whole():
    said = on_a_terminal(COUNTS)
    assert "building" in said and re.search(r"\d+ of 40 images, \S+ images/s, \S+ s left, mIoU", said)
    assert LINE.findall(said) == [str(number) for number in range(0, 40, 4)]


def test_elsewhere_there_are_lines_only():
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == "" and lines[0].endswith(" building ...")
    assert [match[1] for match in map(LINE.fullmatch, lines[1:])] == [
        str(number) for number in range(0, 40, 4)
    ]


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_a_console_that_is_gone_ends_nothing(kind, tmp_path):
    reader, other = pty.openpty() if kind == "terminal" else os.pipe()
    code = f"{COUNTS}\nopen({str(tmp_path / 'done')!r}, 'w').close()"
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=other, stderr=other, env=env, start_new_session=True
    )
    os.close(other)
    os.read(reader, 1)
    os.close(reader)
    assert process.wait(60) >= 0 and (tmp_path / "done").exists()


def test_nor_does_one_that_was_closed_from_the_start(tmp_path):
    code = f"{COUNTS}\nopen({str(tmp_path / 'done')!r}, 'w').close()"
    subprocess.run(["sh", "-c", '"$@" 2>&- >&-', "sh", sys.executable, "-c", code], check=True)
    assert (tmp_path / "done").exists()


@pytest.fixture
def said(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(progress, "_log", lines.append)
    return lines


def test_a_long_count_says_from_time_to_time_how_far_it_is_and_at_its_end_how_long_it_took(said, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("reading", 8 * 2**30, progress.BYTES, after_s=0) as done:
        for _ in range(8):
            now[0] += 20
            done.advance(2**30)
    assert said == [
        "reading: 8.00 GiB ...",
        "reading: 2.00 of 8.00 GiB, 51.2 MiB/s, 0:02:00 left",
        "reading: 4.00 of 8.00 GiB, 51.2 MiB/s, 0:01:20 left",
        "reading: 6.00 of 8.00 GiB, 51.2 MiB/s, 40.0 s left",
        "reading: 8.00 of 8.00 GiB, 51.2 MiB/s, 0.0 s left",
        "reading: 0:02:40",
    ]


def test_less_than_a_gib_is_counted_in_mib(said, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("reading", 3 * 2**20, progress.BYTES, after_s=0) as done:
        now[0] += 60
        done.advance(2**20)
    assert said[:2] == ["reading: 3.0 MiB ...", "reading: 1.0 of 3.0 MiB, 0.0 MiB/s, 0:02:00 left"]


def test_what_is_quick_and_happens_often_is_not_named(said):
    with progress.stage("saving", after_s=30.0):
        pass
    assert list(progress.tracked(range(3), "counting", 3)) == [0, 1, 2] and said == []
    with progress.stage("saving", after_s=0.01):
        time.sleep(0.2)
    assert said == ["saving ..."]


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_rank_0_alone_speaks(said, monkeypatch, variable):
    for name in progress.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    with progress.stage("building"):
        assert list(progress.tracked("ab", "counting", 2, after_s=0)) == ["a", "b"]
    assert said == []
