"""Runs that are asked to stop: they save, end with a code of their own, and a resumed run ends with the
weights of one that nobody disturbed."""

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.exit_codes import INTERRUPTED, LOST, STOPPED
from internseg_ds.training.stop_requests import SAME_REQUEST_S
from tests.conftest import TINY, data_options, free_port
from tests.end_to_end.conftest import SMALL
from tests.end_to_end.test_lost_ranks import nothing_stays, running
from tests.forks import script, start_ranks

STEPS = 24
OPTIONS = [
    f"runner.max_iters={STEPS}",
    f"checkpoint_config.interval={STEPS}",
    "data.workers_per_gpu=1",
    "data.samples_per_gpu=1",
    "engine.global_batch=2",
]


def interruptible(path: str, args: Sequence[str], stdout: Path, stderr: Path) -> None:
    """A script on a rank that hears Ctrl-C, which is ignored where the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    script(path, args, stdout, stderr)


class Run:
    """Two ranks of launch/train.py CONFIG --resume auto in one work directory, with a log file of both."""

    def __init__(
        self, work_dir: Path, options: list[str], *, validate: bool = False, log: Path | None = None
    ) -> None:
        self.log = log or work_dir.with_suffix(f".{time.monotonic_ns()}.log")
        args = [
            TINY,
            "--work-dir",
            str(work_dir),
            "--resume",
            "auto",
            *["--no-validate"] * (not validate),
            "--cfg-options",
            *options,
        ]
        self.ranks = start_ranks(interruptible, 2, free_port(), "launch/train.py", args, self.log, self.log)

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while not self.log.exists() or text not in self.log.read_text():
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in self.ranks), (
                self.log.read_text()[-3000:]
            )
            time.sleep(0.02)

    def codes(self, patience_s: float = 90) -> list[int]:
        """Exit codes. As launchers do, what still runs 10 s after another rank ended is killed."""
        deadline = time.monotonic() + patience_s
        while all(rank.is_alive() for rank in self.ranks):
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)
        for rank in self.ranks:
            rank.join(10)
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]


@pytest.fixture(scope="module")
def options(ade20k) -> list[str]:
    return [*SMALL, *data_options(ade20k), *OPTIONS]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run = Run(work_dir, options)
    assert run.codes() == [0, 0], run.log.read_text()[-3000:]
    return work_dir


@pytest.mark.slow
def test_a_run_disturbed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed, options, tmp_path
):
    signals = 10
    expected, chance, sent, finished, stopped = open_weights(undisturbed), random.Random(0), 0, 0, 0
    while sent < signals or not finished:
        work_dir = tmp_path / f"run{finished}"
        run = Run(work_dir, options)
        if sent < signals:
            sent += 1
            early = chance.random() < 0.2  # while it starts
            if not early:
                run.wait_for("  eta")
            time.sleep(chance.uniform(0, 2))
            number = chance.choice([signal.SIGTERM, signal.SIGUSR1])
            with suppress(ProcessLookupError):  # it has finished
                os.kill(chance.choice(run.ranks).pid, number)
            codes = run.codes()
            assert codes in ([STOPPED, STOPPED], [0, 0]) or (early and STOPPED in codes), (
                codes,
                run.log.read_text()[-3000:],
            )
            stopped += codes == [STOPPED, STOPPED]
        else:
            assert run.codes() == [0, 0], run.log.read_text()[-3000:]
        if (work_dir / "checkpoints" / f"iter_{STEPS}").exists():
            found = open_weights(work_dir)
            assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.shapes)
            finished += 1
    assert stopped > signals / 2  # the signals did not all come too late


def test_an_evaluation_is_left_and_made_up_for(options, ade20k, tmp_path):
    work_dir = tmp_path / "run"
    # some seconds for each evaluation
    options = [
        *options,
        "data.val.img_dir=images/training",
        "data.val.ann_dir=annotations/training",
        "model.test_cfg.stride=(14,14)",
        "data.val.data_root=" + str(ade20k),
        "runner.max_iters=4",
        "checkpoint_config.interval=4",
        "evaluation.interval=2",
        "engine.ema=0.9",
    ]
    stopped_in = set()
    for _ in range(8):
        run = Run(work_dir, options, validate=True)
        deadline = time.monotonic() + 90
        saves = set(work_dir.glob("checkpoints/iter_*[0-9]"))
        while set(work_dir.glob("checkpoints/iter_*[0-9]")) == saves and all(
            rank.is_alive() for rank in run.ranks
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1)
        with suppress(ProcessLookupError):
            os.kill(run.ranks[1].pid, signal.SIGTERM)
        codes = run.codes()
        assert codes in ([STOPPED, STOPPED], [0, 0]), (codes, run.log.read_text()[-3000:])
        if codes == [0, 0]:
            break
        records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        stopped_in.add(records[-1]["step"])
        assert "mIoU" not in records[-1]
    assert codes == [0, 0] and stopped_in
    records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "mIoU" in record] == [2, 4]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]


def test_a_stop_file_stops_all_ranks_and_must_be_removed_to_go_on(options, tmp_path, launch):
    work_dir = tmp_path / "run"
    run = Run(work_dir, options)
    run.wait_for("  eta")
    (work_dir / "STOP").touch()
    assert run.codes() == [STOPPED, STOPPED]
    tag = (work_dir / "checkpoints" / "latest").read_text()
    assert "--resume auto: there is no checkpoint in" in run.log.read_text()
    assert f"--resume auto goes on from {tag}" in run.log.read_text() and tag != f"iter_{STEPS}"
    refused = launch(
        "launch/train.py", TINY, "--work-dir", work_dir, "--cfg-options", *options, processes=1, check=False
    )
    assert refused.returncode == 2 and f"{work_dir / 'STOP'} is there" in refused.stderr


@pytest.mark.slow
def test_what_a_launcher_passes_on_later_is_the_same_request(options, tmp_path):
    run = Run(tmp_path / "run", options)
    run.wait_for("  eta")
    os.kill(run.ranks[1].pid, signal.SIGSTOP)  # rank 0 now waits for it
    time.sleep(0.5)
    for _ in range(2):
        os.kill(run.ranks[0].pid, signal.SIGTERM)
        time.sleep(SAME_REQUEST_S + 0.5)
    assert run.ranks[0].is_alive()
    os.kill(run.ranks[1].pid, signal.SIGCONT)
    assert run.codes() == [STOPPED, STOPPED] and (tmp_path / "run" / "checkpoints" / "latest").is_file()


def test_a_second_ctrl_c_ends_a_rank_at_once_even_inside_a_collective(options, tmp_path):
    run = Run(tmp_path / "run", options)
    run.wait_for("  eta")
    os.kill(run.ranks[1].pid, signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(run.ranks[0].pid, signal.SIGINT)
    time.sleep(SAME_REQUEST_S / 2)
    os.kill(run.ranks[0].pid, signal.SIGINT)  # torchrun, which passes on the same one
    time.sleep(SAME_REQUEST_S / 2 + 0.5)
    assert run.ranks[0].is_alive()
    os.kill(run.ranks[0].pid, signal.SIGINT)
    run.ranks[0].join(5)
    assert run.ranks[0].exitcode == INTERRUPTED
    os.kill(run.ranks[1].pid, signal.SIGCONT)
    assert run.codes()[1] == LOST  # it finds that rank 0 is gone
    assert "got SIGINT: this run saves" in run.log.read_text()


def test_ctrl_c_saves_though_nobody_reads_what_the_run_says(options, tmp_path):
    """Of an ssh session that is gone, say."""
    os.mkfifo(pipe := tmp_path / "pipe")
    run = Run(tmp_path / "run", options, log=pipe)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with pipe.open() as reader:
        said = ""
        while "  eta" not in said:
            said += reader.read(1)
    deadline = time.monotonic() + 10
    while not metrics.read_text():  # the console has a record first
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGINT)
    for rank in run.ranks:
        rank.join(60)
        rank.kill()
        rank.join()
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file() and "stopped at step" in (
        tmp_path / "run" / "train.log"
    ).read_text()
    assert [rank.exitcode for rank in run.ranks] == [STOPPED, STOPPED]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_to_one_rank_while_it_builds_ends_all_with_its_code(number, code, options, tmp_path):
    run = Run(tmp_path / "run", options)
    run.wait_for("building the model")
    os.kill(run.ranks[1].pid, number)
    assert run.codes() == [code, code], run.log.read_text()[-3000:]
    said = run.log.read_text()
    rank = f"rank 1 (host {socket.gethostname()}, process {run.ranks[1].pid})"
    # on a busy machine it is in its first step by the time that it ends
    where = r"at step (0, building|1, \w+) ended with"
    assert re.search(f"{re.escape(rank)} {where} {number.name}, before training began", said), said[-3000:]
    assert "Traceback" not in said


def test_ctrl_c_in_the_terminal_of_deepspeed_saves(ade20k, tmp_path):
    """It comes to launcher and ranks alike, and launch.py asks the ranks again."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as in the background
    try:
        with running(tmp_path, ade20k) as (launcher, _):
            os.killpg(launcher.pid, signal.SIGINT)
            output, _ = launcher.communicate(timeout=60)
            assert nothing_stays(tmp_path, within_s=40)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "checkpoints" / "latest").is_file() and "stopped at step" in (
        tmp_path / "train.log"
    ).read_text()
    # no traceback of ours; deepspeed's own runner has one
    assert 'launch/train.py", line' not in output, output[-3000:]
