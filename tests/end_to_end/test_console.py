import os
import pty
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT, TINY, data_options
from tests.end_to_end.conftest import SMALL

LINE = re.compile(r"\d\d:\d\d:\d\d (.*)")
STAGES = [
    "loading torch and mmcv",
    "loading mmseg, reading ",
    "loading DeepSpeed",
    "checking the model",
    "meeting of 2 processes",
    "model       EncoderDecoder of InternViT6B",
    "to resume ",
    "building the model",
    "step 0: mIoU ",
    "first step",
    "step  2/12  loss ",
    "saved ",
    "step 6: mIoU ",
    "step 12/12  loss ",
    "step 12: mIoU ",
    "trained to step 12; best mIoU ",
]


@pytest.fixture(scope="module")
def said(trained):
    """What the processes of a run have written, without the lines of its launcher."""
    lines = [line for line in trained.output.splitlines() if not line.startswith("[20")]
    others = [line for line in lines if not LINE.fullmatch(line)]
    assert others == [], "of somebody else"
    return [LINE.fullmatch(line)[1] for line in lines]


def test_a_run_says_what_it_does_in_order_and_nothing_twice(said):
    places = [next(place for place, line in enumerate(said) if line.startswith(stage)) for stage in STAGES]
    assert places == sorted(places)
    once = [line for line in said if not line.startswith("straggler")]
    assert len(set(once)) == len(once)


def test_the_log_has_what_the_console_had_and_libraries_a_file_of_their_own(said, trained):
    log = [line.split(" ", 1)[1] for line in (trained.work_dir / "train.log").read_text().splitlines()]
    assert sorted(log) == sorted(said)
    assert log.index("loading DeepSpeed ...") < 8  # behind the header
    libraries = (trained.work_dir / "libraries.log").read_text()
    assert libraries.count("Loaded 23 images") == 1 and "built successfully" in libraries


def test_lines_of_steps_are_short_and_have_the_score_and_records_have_percent(said, trained):
    steps = [line for line in said if re.match(r"step +\d+/12 ", line)]
    assert max(map(len, steps)) < 190 and not any("aux." in line for line in steps)
    score, best = trained.scores[6], max(trained.scores[0], trained.scores[6])
    assert f"  mIoU {score:.2f} % (best {best:.2f} %)  eta " in steps[-1]
    scored = next(line for line in said if line.startswith("step 6: "))
    assert f"mIoU {score:.2f} %" in scored and re.search(r"; 7 images in \S+ s$", scored)
    assert all(record["v"] == 2 for record in trained.records)
    newest = next(record for record in reversed(trained.records) if "mIoU" in record)
    rows = (trained.work_dir / "per_class.csv").read_text().splitlines()
    assert rows[0] == "class,IoU %,Acc %" and len(rows) == 14  # 13 classes have labelled pixels
    values = [float(row.split(",")[1]) for row in rows[1:]]
    assert values == sorted(values, reverse=True)
    name = rows[1].split(",")[0]
    assert values[0] == pytest.approx(newest[f"IoU.{name}"], abs=0.01) and values[0] > 1


@pytest.mark.slow
def test_a_run_on_a_terminal_draws_rows_and_whole_lines(ade20k, tmp_path):
    main, other = pty.openpty()
    command = [sys.executable, "launch/train.py", TINY, "--work-dir", str(tmp_path / "run"), "--cfg-options"]
    options = [*SMALL, *data_options(ade20k), "runner.max_iters=4", "evaluation.interval=2"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], cwd=ROOT, stdout=other, stderr=other, env=env)
    os.close(other)
    written = b""
    try:
        while piece := os.read(main, 65536):
            written += piece
    except OSError:  # the run has ended
        pass
    assert process.wait() == 0, written[-3000:]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    for row in ("loading torch", "building the model", "first step", "evaluating"):
        assert re.search(rf". {row}.* 0:00:0\d", text), row
    for line in (tmp_path / "run/train.log").read_text().splitlines():
        assert line in text
