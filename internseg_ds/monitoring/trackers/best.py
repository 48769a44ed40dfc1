"""The best score of a run, over all of its starts."""

from dataclasses import dataclass
from pathlib import Path

from internseg_ds.monitoring.json_lines import read_json_lines


@dataclass(frozen=True)
class Best:
    """The highest score so far, in the units of records."""

    name: str
    """mmseg's name of the score."""
    step: int
    value: float


def best_recorded(records: Path, score: str) -> Best | None:
    """The first record of a file of JSON lines with the highest value of a score; those of step 0 do not count. None
    where there is none."""
    best: Best | None = None
    for values in read_json_lines(records):
        value, step = values.get(score), values.get("step")
        if isinstance(value, float) and step and (best is None or value > best.value):
            best = Best(score, step, value)
    return best
