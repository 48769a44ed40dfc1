"""keep_running with small scripts in the place of a training, and once with a real one."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from internseg_ds.errors import ConfigError
from internseg_ds.training.keep_running import AGAIN_S, can_be_mended, resuming, work_dir_of
from tests.conftest import TINY, free_port
from tests.schedulers.conftest import STEPS, steps_of
from tests.schedulers.runs import Started, started, wait_for

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
work_dir = Path(sys.argv[sys.argv.index("--work-dir") + 1])
with (work_dir / "starts").open("a") as starts:
    starts.write(" ".join(sys.argv[1:]) + chr(10))
start = len((work_dir / "starts").read_text().splitlines())
def save(step):
    (work_dir / "checkpoints").mkdir(exist_ok=True)
    (work_dir / "checkpoints" / "latest").write_text(f"iter_{step}")
"""


def keeping(
    work_dir: Path, body: str, *arguments: str, restarts: int = 2, delay: float = 0.01
) -> list[object]:
    """keep_running with a script that notes its starts, and then does `body`, in which `start` counts from
    1."""
    script = work_dir / "train.py"
    script.write_text(SCRIPT + body)
    return [
        sys.executable,
        "launch/keep_running.py",
        "--max-restarts",
        restarts,
        "--delay",
        delay,
        "--",
        sys.executable,
        script,
        "config.py",
        "--work-dir",
        work_dir,
        *arguments,
    ]


def starts(work_dir: Path) -> list[str]:
    """The arguments of each start, after the work directory."""
    file = work_dir / "starts"
    return (
        [line.partition(str(work_dir))[2].strip() for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )


@pytest.mark.parametrize(
    ("code", "mended"),
    [
        (0, False),
        (2, False),
        (3, False),
        (75, False),
        (127, False),
        (1, True),
        (69, True),
        (134, True),
        (137, True),
        (139, True),
        (247, True),
        (255, True),
        (-9, True),
    ],
)
def test_what_a_restart_can_mend(code, mended):
    assert can_be_mended(code) == mended


@pytest.mark.parametrize(
    ("options", "at_first", "once_saved"),
    [
        ("--seed 3", "--seed 3 --resume auto", "--seed 3 --resume auto"),
        (
            "--cfg-options a=1 b=2",
            "--cfg-options a=1 b=2 --resume auto",
            "--cfg-options a=1 b=2 --resume auto",
        ),
        ("--resume other/iter_5 --seed 3", "--resume other/iter_5 --seed 3", "--seed 3 --resume auto"),
        ("--resume-from=other --seed 3", "--resume-from=other --seed 3", "--seed 3 --resume auto"),
        ("--auto-resume --seed 3", "--auto-resume --seed 3", "--seed 3 --resume auto"),
    ],
)
def test_a_named_checkpoint_stays_until_the_run_has_saved_one_of_its_own(options, at_first, once_saved):
    assert " ".join(resuming(options.split(), saved=False)) == at_first
    assert " ".join(resuming(options.split(), saved=True)) == once_saved


TINY_WORK_DIR = "work_dirs/upernet_intern_vit_tiny_112_ade20k"


@pytest.mark.parametrize(
    ("command", "work_dir"),
    [
        ("deepspeed --num_gpus 8 launch/train.py configs/mine.py --seed 1", "work_dirs/mine"),
        ("deepspeed launch/train.py configs/mine.py --work-dir elsewhere", "elsewhere"),
        (".venv/bin/internseg-train configs/mine.py --seed 1", "work_dirs/mine"),
        ("internseg-train intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k", TINY_WORK_DIR),
        ("deepspeed --module internseg_ds.cli.train --seed 1 " + TINY, TINY_WORK_DIR),
        ("mpirun -np 2 python launch/train.py configs/mine.py --work-dir=elsewhere/2", "elsewhere/2"),
    ],
)
def test_where_a_command_keeps_its_checkpoints(command, work_dir):
    assert work_dir_of(command.split()) == Path(work_dir)


def test_the_work_directory_is_the_configs_where_it_names_one(tmp_path):
    (tmp_path / "mine.py").write_text("work_dir = 'elsewhere'\n")
    command = ["deepspeed", "launch/train.py", str(tmp_path / "mine.py")]
    assert work_dir_of(command) == Path("elsewhere")
    assert work_dir_of([*command, "--cfg-options", "work_dir=there"]) == Path("there")
    assert work_dir_of([*command, "--work-dir", "here"]) == Path("here")


def test_a_command_without_a_work_directory_is_refused():
    with pytest.raises(ConfigError, match="--work-dir"):
        work_dir_of(["bash", "run.sh"])


def test_a_crash_a_signal_and_a_lost_rank_are_mended_and_each_start_is_logged(tmp_path):
    body = (
        "if start == 1: sys.exit(1)\nif start == 2: sys.exit(69)\nif start == 3: "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with started(keeping(tmp_path, body, restarts=3), tmp_path / "log") as run:
        assert run.wait() == 0, run.output
    assert starts(tmp_path) == ["--resume auto"] * 4
    assert (
        run.output.count("keep_running: starting ") == 4
        and "code 69; restart 2 of 3" in run.output
        and "code -9; restart 3 of 3" in run.output
    )
    # 2026-11-21 14:55:03
    assert all(
        line[:4].isdigit() and line[13] == ":" for line in run.output.splitlines() if "keep_running: " in line
    )


@pytest.mark.parametrize("code", [2, 3, 75])
def test_what_a_restart_cannot_mend_is_passed_on_at_once(code, tmp_path):
    with started(keeping(tmp_path, f"sys.exit({code})"), tmp_path / "log") as run:
        assert run.wait() == code
    assert len(starts(tmp_path)) == 1


def test_restarts_are_counted_anew_after_a_checkpoint(tmp_path):
    # two restarts in a row that bring nothing follow the save of the fourth start
    body = "if start in (2, 4): save(start)\nsys.exit(1)"
    with started(keeping(tmp_path, body, "--resume", "other/iter_5"), tmp_path / "log") as run:
        assert run.wait() == 1
    assert starts(tmp_path) == ["--resume other/iter_5"] * 2 + ["--resume auto"] * 4
    assert "restart 2 of 2 in 0 s\n" in run.output and "no restart is left" in run.output


def test_the_delay_doubles(tmp_path):
    with started(keeping(tmp_path, "sys.exit(1)", restarts=3, delay=0.2), tmp_path / "log") as run:
        began = time.monotonic()
        assert run.wait() == 1 and time.monotonic() - began > 0.2 + 0.4 + 0.8
    assert len(starts(tmp_path)) == 4


SAVES = """
def stop(*_):
    save(start)
    os._exit(75)
signal.signal(signal.SIGUSR1, stop)
(work_dir / "ready").touch()
time.sleep(60)
"""
LAUNCHES = (
    "import subprocess\nif 'RANK' not in os.environ:\n"
    f"    sys.exit(subprocess.run([sys.executable, *sys.argv], env={{**os.environ, 'RANK': "
    f"'0'}}).returncode)\n{SAVES}"
)


def asked(run: Started, number: int) -> None:
    os.kill(run.process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_has_the_training_save_and_is_no_reason_to_start_again(number, tmp_path):
    # the training is a child's child, of a launcher that knows no signals
    with started(keeping(tmp_path, LAUNCHES), tmp_path / "log") as run:
        wait_for((tmp_path / "ready").exists, "start")
        asked(run, number)
        assert run.wait(timeout_s=20) == 75, run.output
    assert (tmp_path / "checkpoints" / "latest").exists() and number.name in run.output


def test_a_command_that_does_not_listen_gets_the_signal_itself(tmp_path):
    with started(keeping(tmp_path, "(work_dir / 'ready').touch()\ntime.sleep(60)"), tmp_path / "log") as run:
        wait_for((tmp_path / "ready").exists, "start")
        asked(run, signal.SIGTERM)
        assert run.wait(timeout_s=20) == 143 and len(starts(tmp_path)) == 1


def test_a_second_signal_ends_a_training_that_does_not_end(tmp_path):
    with started(keeping(tmp_path, SAVES.replace("os._exit(75)", "pass")), tmp_path / "log") as run:
        wait_for((tmp_path / "ready").exists, "start")
        asked(run, signal.SIGINT)
        wait_for((tmp_path / "checkpoints" / "latest").exists, "save")
        time.sleep(AGAIN_S + 0.1)  # signals closer together are one request
        asked(run, signal.SIGINT)
        assert run.wait(timeout_s=20) == 128 + signal.SIGINT, run.output


def test_a_signal_between_two_starts_ends_the_waiting(tmp_path):
    with started(keeping(tmp_path, "sys.exit(1)", delay=60), tmp_path / "log") as run:
        wait_for(lambda: "restart 1 of 2 in 60 s" in run.output, "restart")
        asked(run, signal.SIGTERM)
        assert run.wait(timeout_s=20) == 1 and len(starts(tmp_path)) == 1


def test_a_launcher_that_leaves_its_training_alone_has_failed_whatever_it_says(tmp_path):
    body = (
        "import subprocess\nif 'TRAINING' in os.environ:\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: None); (work_dir / 'ready').touch(); time.sleep(4); "
        "sys.exit()\n"
        "if start <= 2:\n    subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, 'TRAINING': "
        "'x'})\n"
        "    while not (work_dir / 'ready').exists(): time.sleep(0.1)\n"
    )
    with started(keeping(tmp_path, body), tmp_path / "log") as run:
        assert run.wait(timeout_s=30) == 0, run.output
    # the training's own start is one of them
    assert len(starts(tmp_path)) == 3 and "code 1; restart 1 of 2" in run.output


def test_a_killed_launcher_leaves_no_training_beside_the_next_one(tmp_path):
    body = (
        "import subprocess\nif 'TRAINING' in os.environ:\n"
        "    (work_dir / 'ready').touch(); time.sleep(3); (work_dir / 'outlived').write_text('x'); "
        "sys.exit()\n"
        "if start > 2: sys.exit(0 if (work_dir / 'outlived').exists() else 2)\n"
        "subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, 'TRAINING': 'x'})\nwhile not "
        "(work_dir / 'ready').exists(): time.sleep(0.1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with started(keeping(tmp_path, body), tmp_path / "log") as run:
        assert run.wait(timeout_s=30) == 0, run.output


def test_a_program_that_does_not_exist_is_one_clear_error(tmp_path):
    with started(
        [sys.executable, "launch/keep_running.py", "--", "no_such_launcher", "train.py", "config.py"],
        tmp_path / "log",
    ) as run:
        assert (
            run.wait() == 2
            and "error: no_such_launcher cannot be started" in run.output
            and "Traceback" not in run.output
        )


@pytest.mark.multinode
def test_a_killed_rank_of_the_deepspeed_launcher_comes_back(training, tmp_path):
    work_dir = tmp_path / "run"
    command = [
        sys.executable,
        "launch/keep_running.py",
        "--delay",
        1,
        "--",
        "deepspeed",
        "--num_gpus",
        2,
        "--master_port",
        free_port(),
        *training(work_dir),
    ]
    with started(command, tmp_path / "log") as run:
        wait_for((work_dir / "checkpoints" / "latest").exists, "checkpoint", output=lambda: run.output)
        run.ranks()["1"].kill()
        assert run.wait() == 0, run.output
    assert run.output.count("keep_running: starting ") == 2
    assert steps_of(work_dir) == list(range(1, STEPS + 1))
