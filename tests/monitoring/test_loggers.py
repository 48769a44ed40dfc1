import json
import logging

import pytest

from internseg_ds.monitoring.curves import draw_curves
from internseg_ds.monitoring.environment import environment_lines
from internseg_ds.monitoring.loggers import (
    ConsoleLogger,
    JsonlLogger,
    open_loggers,
)
from internseg_ds.monitoring.run_log import start_logging
from internseg_ds.training.train_state import TrainState, due


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_of_steps_that_a_resumed_run_repeats_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlLogger(path, start=0)
    for step in (1, 2, 3, 4):
        first.write(step, {"loss": 1.0})
    first.close()
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed while writing
    resumed = JsonlLogger(path, start=2)
    resumed.write(3, {"loss": 2.0})
    resumed.close()
    assert steps(path) == [1, 2, 3]


def test_a_new_run_in_an_old_work_directory_starts_its_metrics_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    JsonlLogger(path, start=0).close()
    assert steps(path) == []


def test_the_log_starts_with_what_the_run_runs_on_and_has_what_was_said_before_its_folder_was_there(
    tmp_path, capfd
):
    log = logging.getLogger("internseg_ds.training")
    start_logging(None, level="INFO", is_main=True)
    log.info("compiling something")
    start_logging(tmp_path, level="INFO", is_main=True, header=environment_lines(7, ["a", "a", "b"]))
    log.info("on we go")
    start_logging(None, level="INFO", is_main=True)
    log.info("another run")
    lines = [line.split(" ", 1)[1] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert all(
        f"{name} " in lines[0]
        for name in ("python", "torch", "CUDA", "deepspeed", "mmcv-full", "mmsegmentation", "internseg_ds")
    )
    assert "seed 7, 3 processes: 2 on a, 1 on b" in lines[1] and lines[2].startswith("command: ")
    assert lines[3:] == ["compiling something", "on we go"]
    assert capfd.readouterr().err.count("compiling something") == 1


def test_a_line_of_the_console_has_what_a_person_watches_and_the_last_score_beside_the_best(caplog):
    console = ConsoleLogger(10, 0)
    step = {"aux.loss_ce": 1.9, "loss": 2.5, "lr": 1e-4, "mfu": 41.23, "data_wait": 0.4, "loss_spikes": 0}
    with caplog.at_level(logging.INFO, "internseg_ds"):
        console.write(3, {"aAcc": 90.0, "mIoU": 76.408, "IoU.wall": 30.0})
        console.write(4, {"aAcc": 80.0, "mIoU": 70.0, "IoU.wall": 30.0})
        console.write(5, step | {"waits_for_slowest": 12.0, "skipped_steps": 2})
    (line,) = caplog.messages
    assert line.startswith(
        " 5/10".replace(" ", "step  ", 1)
        + "  loss 2.5  lr 1.00e-04  mfu 41.2 %  waits_for_slowest 12.0 %  skipped_steps 2"
        "  mIoU 70.00 % (best 76.41 %)  eta "
    )
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "internseg_ds"):
        console.write(6, step)
    assert "  aux.loss_ce 1.9  data_wait 0.4 %" in caplog.messages[0]


def test_the_best_score_on_the_console_is_of_a_checkpoint(caplog):
    console = ConsoleLogger(10, 0)
    with caplog.at_level(logging.INFO, "internseg_ds"):
        console.write(0, {"mIoU": 50.0})  # of the weights that the run starts from
        console.write(1, {"loss": 2.5})
        console.write(2, {"mIoU": 40.0})
        console.write(3, {"loss": 2.5})
    assert "  mIoU 50.00 % (before training)  eta" in caplog.messages[0]
    assert "  mIoU 40.00 % (best 40.00 %)  eta" in caplog.messages[1]


def test_a_resumed_run_has_one_unit_in_its_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = [
        {"step": 1, "loss": 1.0, "mfu": 0.5},
        {"step": 1, "mIoU": 0.123457, "IoU.wall": None},
        {"step": 1, "loss": 2.0, "mfu": 0.9, "hfu": 1.2},  # of a peak that was measured on a busy device
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    for start in (1, 2):  # what is converted is converted once
        logger = JsonlLogger(path, start=start)
        logger.write(start + 1, {"mIoU": 13.0})
        logger.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][:3] == [
        {"v": 2, "step": 1, "loss": 1.0, "mfu": 50.0},
        {"v": 2, "step": 1, "mIoU": 12.3457, "IoU.wall": None},
        {"v": 2, "step": 1, "loss": 2.0},
    ]
    assert [json.loads(line).get("mIoU") for line in path.read_text().splitlines()[3:]] == [13.0, 13.0]


def test_a_resumed_run_has_the_scores_of_its_earlier_starts_on_its_console(tmp_path, caplog):
    records = [{"mIoU": 50.0}, {"mIoU": 40.0, "IoU.wall": None}, {"loss": 1.0}, {"mIoU": 90.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"v": 2, "step": 1 + n, **each}) + "\n" for n, each in enumerate(records))
    )
    with (
        caplog.at_level(logging.INFO, "internseg_ds"),
        open_loggers(tmp_path, max_steps=10, start=3, is_main=True) as loggers,
    ):
        for logger in loggers:
            logger.write(4, {"loss": 0.5})
    assert "loss 0.5  mIoU 40.00 % (best 50.00 %)  eta" in caplog.messages[0]  # that of step 4 is made again


def test_only_rank_0_writes(tmp_path):
    with open_loggers(tmp_path, max_steps=1, start=0, is_main=False) as loggers:
        assert loggers == []
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_json_does_not_know_is_null(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl", start=0)
    logger.write(1, {"loss": 1.0, "grad_norm": float("inf")})
    logger.close()
    assert '"grad_norm": null' in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("step", "every", "expected"), [(5, 5, True), (6, 5, False), (12, 5, True), (12, 0, True), (11, 0, False)]
)
def test_every_cadence_includes_the_last_step(step, every, expected):
    assert due(step, every, last=12) is expected


def test_curves_are_a_picture(tmp_path):
    # a full disk
    (tmp_path / "m.jsonl").write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "mIoU": 0.5}\n{"step": 3, "lo'
    )
    draw_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_state_survives_its_own_dict():
    state = TrainState(step=3, images=24, seed=7, best=0.5, best_tag="iter_2")
    copy = TrainState()
    copy.load_state_dict(state.state_dict())
    assert copy == state
