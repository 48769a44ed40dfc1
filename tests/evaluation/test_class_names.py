"""Names of classes that a table could not hold as they are."""

from internseg_ds.config.experiment import read_experiment
from internseg_ds.evaluation.class_table import extremes, table
from internseg_ds.evaluation.model_card import RunRecord, model_card
from internseg_ds.monitoring.units import in_cell, is_percent
from tests.conftest import ROOT, TINY

ODD, CELL = " road\nor | track ", "road or / track"
SCORES = {ODD: {"IoU": 50.0}, "car": {"IoU": 40.0}}


def test_line_breaks_and_bars_in_names_leave_tables_whole():
    record = RunRecord({"mIoU": 0.45, f"IoU.{ODD}": 0.5, "IoU.car": 0.4})
    card = model_card("mine", read_experiment(ROOT / TINY), {"step": 5}, record, [ODD, "car"], "pass")
    rows = [line for line in card.splitlines() if line.endswith("0.00 |")]
    assert rows == [f"| {CELL} | 50.00 |", "| car | 40.00 |"]
    assert len(table(SCORES).splitlines()) == 3 and "\n" not in extremes(SCORES)
    assert in_cell(ODD) == CELL


def test_the_score_of_a_class_is_in_percent_whatever_its_name():
    assert is_percent(f"IoU.{ODD}")
