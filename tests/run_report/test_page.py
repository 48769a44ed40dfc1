"""report.html: what it says, that nothing in it is taken for markup, and that it never troubles a training."""

import json
import logging
import re
import time

import pytest

from internseg_ds.errors import ConfigError
from internseg_ds.monitoring.run_starts import write_start
from internseg_ds.run_report.class_scores import class_rows
from internseg_ds.run_report.page import check_work_dir, write_comparison, write_run_page
from internseg_ds.run_report.records import read_run
from internseg_ds.run_report.refreshed_page import RefreshedPage
from tests.run_report.runs import many_records, start, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_run(tmp_path_factory.mktemp("runs") / "first")
    write_start(made, start(20))
    return made


def test_a_page_has_the_numbers_of_the_records(folder):
    text = write_run_page(folder).read_text()
    assert "<b>40.00 %</b>" in text and "step 40 of 40, finished" in text
    rows = re.findall(r'<tr><td class="number">\d+</td><td class="name">.*?</tr>', text)
    assert len(rows) == 3 and "40.00" in rows[0] and "+10.00" in rows[0]
    assert f"{100 * 40 / 101:.2f}" in rows[1] and f"{100 * 40 / 102:.2f}" in rows[2]
    assert "resumed from step 20" in text and "step 17 was skipped" in text
    assert "step 30: loss 43.5" in text
    assert "77.00 % of the labelled pixels" not in text
    assert f"{100 * 230 / 300:.2f} % of the labelled pixels" in text  # of the confusion matrix
    assert text.count("data:image/jpeg") == (2 + 4) + 3 + 3


def test_a_run_with_steps_left_has_the_command_that_goes_on_with_it(folder, tmp_path):
    command = "deepspeed launch/train.py mine.py --resume auto"
    assert command in write_run_page(write_run(tmp_path / "half", steps=20)).read_text()
    assert command not in write_run_page(folder).read_text()


def test_a_class_without_a_score_at_the_newest_evaluation_is_not_listed(tmp_path):
    # records of two versions: fractions, and percent
    lines = [{"step": 1, "IoU.a": 0.5, "IoU.b": 0.25}, {"v": 2, "step": 2, "IoU.a": 75.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = class_rows(read_run(tmp_path))
    assert (row.name, row.newest, row.change) == ("a", 75, 25)


def test_nothing_that_is_read_is_markup(folder):
    text = write_run_page(folder).read_text()
    for markup in ("<script>alert", "<b>one", "<i>mine", "<u>ghost", "<img src=x>"):
        assert markup not in text
    assert text.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;u&gt;ghost&lt;/u&gt;" in text


def test_nothing_is_asked_of_a_network(folder):
    text = write_run_page(folder).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "url(" not in text and "@import" not in text


def test_a_folder_without_records_has_a_page_and_one_without_a_run_is_refused(tmp_path):
    assert "no records yet" in write_run_page(tmp_path).read_text()
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        check_work_dir(tmp_path)
    with pytest.raises(ConfigError, match="there is no work directory"):
        check_work_dir(tmp_path / "nowhere")


def test_runs_are_compared(folder, tmp_path):
    other = write_run(tmp_path / "first", steps=20, lr=2e-3)
    text = write_comparison([folder, other], tmp_path / "both.html").read_text()
    differing = re.search(r'<table id="differing">.*?</table>', text, re.S)[0]
    assert re.findall(r'<td class="text">(.*?)</td>', differing) == ["optimizer.lr", "0.001", "0.002"]
    table = re.search(r'<table id="runs">.*?</table>', text, re.S)[0]
    assert "40.00 % (step 40)" in table and "20.00 % (step 20)" in table
    # two folders of one name are told apart
    assert f"{folder.parent.name}/first" in table and f"{tmp_path.name}/first" in table
    assert "<script>alert" not in text


@pytest.mark.slow
def test_the_page_of_80000_records_takes_a_few_seconds_and_is_small(tmp_path):
    many_records(tmp_path / "metrics.jsonl", 80_000)
    began = time.process_time()  # of a machine that others use, too
    page = write_run_page(tmp_path)
    assert time.process_time() - began < 8
    assert page.stat().st_size < 1_000_000 and "57.25" in page.read_text()


def test_a_page_that_cannot_be_written_is_a_line_in_the_log(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 1.0, "loss": 1.0}) + "\n")
    (tmp_path / "report.html").mkdir()
    page = RefreshedPage(tmp_path)
    with caplog.at_level(logging.WARNING, logger="internseg_ds"):
        page.refresh()
        page.wait()
    (line,) = caplog.records
    assert "report.html is not written" in line.message and "the training goes on" in line.message
    (tmp_path / "report.html").rmdir()
    page.close()
    assert (tmp_path / "report.html").is_file()
