"""What is read of a work directory, whatever state a run has left it in."""

import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from internseg_ds.monitoring.evaluation_record import (
    FOLDER,
    evaluation_files,
    read_evaluation,
    rewind_evaluations,
)
from internseg_ds.monitoring.run_starts import read_starts, write_start
from internseg_ds.run_report.class_scores import class_rows
from internseg_ds.run_report.records import read_metrics, read_run
from internseg_ds.run_report.summary import figures
from tests.run_report.runs import CLASSES, evaluation, start, write_run


def test_a_file_that_ends_within_a_line_has_the_records_before(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        '{"step": 1, "time": 5, "loss": 2.5}\n{"step": 2, "time": 6, "loss": null}\n{"step": 3, "lo'
    )
    metrics = read_metrics(file)
    assert metrics.get("loss").steps.tolist() == [1, 2]
    assert metrics.get("loss").last == (1, 2.5) and metrics.get("time").last == (2, 6.0)


@pytest.mark.parametrize(
    "line", ["[1, 2]", "3", '{"loss": 1}', '{"step": "x", "loss": 1}', "\x00\x00", "", "[" * 100_000]
)
def test_lines_that_are_no_records_are_left_out(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{line}\n{{"step": 1, "loss": 2.5}}\n')
    assert read_metrics(file).get("loss").values.tolist() == [2.5]


def test_steps_that_are_repeated_are_those_of_the_later_run_and_a_restart(tmp_path):
    file = tmp_path / "metrics.jsonl"
    records = [{"step": step, "time": step, "loss": 1.0} for step in (1, 2, 3, 4, 5)]
    records += [{"step": 5, "time": 5, "mIoU": 0.5}]
    records += [{"step": step, "time": 100 + step, "loss": 2.0} for step in (4, 5)]
    records += [{"step": 5, "time": 200, "loss": 3.0}, {"step": 5, "time": 201, "mIoU": 0.6}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    metrics = read_metrics(file)
    assert metrics.get("loss").values.tolist() == [1, 1, 1, 2, 3]
    assert metrics.get("mIoU").values.tolist() == [60]
    assert [(restart.step, restart.repeated) for restart in metrics.restarts] == [(3, 3), (4, 1)]


def test_starts_are_restarts_even_where_a_resumed_run_has_dropped_what_it_repeats(tmp_path):
    folder = write_run(tmp_path / "run")
    write_start(folder, start(20))
    (folder / "starts.jsonl").open("a").write('{"time": 1')
    run = read_run(folder)
    assert [restart.step for restart in run.restarts] == [20]
    assert run.max_steps == 40 and run.step == 40


def test_the_time_of_a_run_is_that_of_its_starts_without_what_lies_between_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (0, 20):
        write_start(folder, replace(start(step), time=150.0 * step))
    times = [(10, 600.0), (20, 1200.0), (30, 3600.0), (40, 4200.0), (41, 4200.0 + 7200)]
    lines = [json.dumps({"v": 2, "step": step, "time": time, "loss": 1.0}) for step, time in times]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = {each.name: each.text for each in figures(read_run(folder))}
    assert (
        found["time"] == "0:40 h"
    )  # 20 minutes of each start; half an hour between them and two without a record are none


def test_the_best_score_is_none_of_before_the_first_step(tmp_path):
    (tmp_path / "starts.jsonl").touch()
    lines = [json.dumps({"v": 2, "step": step, "mIoU": score}) for step, score in ((0, 50.0), (10, 40.0))]
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert figures(read_run(tmp_path))[0].name == "last mIoU"
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    best, last = figures(read_run(tmp_path))[:2]
    assert (best.name, best.text, best.more) == ("best mIoU", "40.00 %", "step 10")
    assert (last.text, last.more) == ("40.00 %", "step 10")


def test_a_class_without_labelled_pixels_has_no_row(tmp_path):
    folder = write_run(tmp_path / "run")
    assert {row.name for row in class_rows(read_run(folder))} == {*CLASSES}
    newest = evaluation(40)
    newest.confusion[1] = 0  # predicted here and there, and labelled nowhere
    newest.write(folder / FOLDER)
    assert [row.name for row in class_rows(read_run(folder))] == [CLASSES[0], CLASSES[2]]


def test_an_empty_folder_is_a_run_without_records(tmp_path):
    run = read_run(tmp_path)
    assert run.step == 0 and run.starts == [] and run.evaluations == [] and run.restarts == []


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    written = evaluation(7)
    found = read_evaluation(written.write(tmp_path))
    assert (found.step, found.images, found.scores, found.classes) == (7, 7, written.scores, written.classes)
    assert (found.confusion == written.confusion).all() and (found.palette == written.palette).all()
    for ours, theirs in zip(found.pictures, written.pictures, strict=True):
        assert (ours.name, ours.sort, ours.score) == (theirs.name, theirs.sort, theirs.score)
        assert (ours.truth == theirs.truth).all() and (ours.prediction == theirs.prediction).all()
        assert ours.image.shape == theirs.image.shape
    # by hand: 90 right of 100 labelled and 150 predicted; 50 of 100 and 60; 90 of 100 and 90
    assert found.iou == pytest.approx([90 / 160, 50 / 110, 90 / 100])


def test_values_that_cannot_be_are_none(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "time": 5, "loss": 2.5}',
        '{"step": NaN, "loss": 1}',
        '{"step": Infinity, "loss": 1}',
        f'{{"step": 2, "time": 1e20, "loss": {10**400}}}',
        '{"step": 1, "time": "today", "loss": 3.5}',
    ]
    file.write_text("\n".join(lines))
    metrics = read_metrics(file)
    assert metrics.get("loss").steps.tolist() == [1] and metrics.get("loss").last == (1, 3.5)
    assert [restart.time for restart in metrics.restarts] == [None]


@pytest.mark.parametrize("odd", [dict(step=None), dict(time="now"), dict(data=None), dict(notes=[1])])
def test_starts_of_other_types_are_left_out(tmp_path, odd):
    folder = write_run(tmp_path / "run")
    sound = read_starts(folder)
    line = json.loads((folder / "starts.jsonl").read_text().splitlines()[0])
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({**line, **odd}) + "\n")
    assert read_starts(folder) == sound


def test_an_evaluation_with_flipped_bytes_is_damaged_or_the_same(tmp_path):
    file = evaluation_files(write_run(tmp_path / "run") / "evaluations")[40]
    whole, chance = file.read_bytes(), np.random.default_rng(0)
    for place in chance.integers(0, len(whole), 60):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with suppress(ValueError):
            assert read_evaluation(file).step == 40


def test_a_damaged_evaluation_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    damaged = evaluation_files(folder / "evaluations")[40]
    damaged.write_bytes(damaged.read_bytes()[:500])
    with pytest.raises(ValueError, match="is damaged"):
        read_evaluation(damaged)
    assert [each.step for each in read_run(folder).evaluations] == [10, 20, 30]


def test_a_resumed_run_takes_later_evaluations_away(tmp_path):
    folder = write_run(tmp_path / "run") / "evaluations"
    rewind_evaluations(folder, 20)
    assert list(evaluation_files(folder)) == [10, 20]


def test_learning_rates_are_the_schedules_for_each_base_rate():
    noted = start(0).learning_rates
    assert [rates.name for rates in noted] == ["layer 2", "layer 1", "layer 0"]
    assert [rates.parameters for rates in noted] == [20, 20, 20]
    first = dict(zip(noted[0].steps, noted[0].rates, strict=True))
    # mmcv's: linear over 40 steps to 0, and update 10 is the one from step 9 to 10; warmup of 4 steps from 0.1
    assert first[10] == pytest.approx(0.9e-3 * (1 - 9 / 40), rel=1e-4)
    assert first[1] == pytest.approx(0.9e-3 * 0.1, rel=1e-4)
    assert np.allclose(np.array(noted[1].rates), 0.9 * np.array(noted[0].rates), rtol=1e-4)


def test_a_start_is_read_as_it_was_written(tmp_path):
    write_start(tmp_path, start(5))
    assert read_starts(tmp_path) == [start(5)]
