"""In which units metrics are recorded: scores and shares are percent, on the console, in metrics.jsonl and in
trackers. In Python (`Evaluation.metrics`) and in checkpoints scores are 0 to 1, as mmseg has them.
"""

import re
from collections.abc import Mapping
from typing import Any

VERSION = 2
""""v" of a record in metrics.jsonl. Records without it are of a time when scores and shares were 0 to 1."""
SHARES = ("mfu", "hfu", "data_wait", "waits_for_slowest")
"""Metrics of a training that are shares."""
SCORE = re.compile(r"(?:\d+_)?(?:aAcc|m[A-Z]\w*)")
"""mmseg's names of scores of all classes together; of several data sets, with the number of theirs."""
SCORE_OF_A_CLASS = re.compile(r"(?:\d+_)?[A-Z]\w*\..*", re.DOTALL)
"""mmseg's names of scores of one class, such as IoU.wall."""


def in_cell(name: str) -> str:
    """The name of a class on one line, as a table in Markdown can hold it."""
    return " ".join(name.split()).replace("|", "/")


def is_percent(name: str) -> bool:
    """Whether a metric of this name is recorded in percent."""
    return bool(name in SHARES or SCORE.fullmatch(name) or SCORE_OF_A_CLASS.fullmatch(name))


def in_percent(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a record with scores and shares in percent, which are given as 0 to 1. What is no number stays
    as it is."""

    def converted(name: str, value: Any) -> Any:
        if not is_percent(name) or not isinstance(value, (int, float)):
            return value
        # scores are rounded to six digits, which are four of percent
        return 100 * value if name in SHARES else round(100 * value, 4)

    return {name: converted(name, value) for name, value in values.items()}


def todays(line: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it was read from metrics.jsonl, of any version, in today's units and without its version. mfu and
    hfu of the first version that no peak allows, which was measured while the device was busy, are left out."""
    version = line.get("v", 1)
    values = {name: value for name, value in line.items() if name != "v"}
    if version != 1:
        return values
    if max(values.get("mfu") or 0, values.get("hfu") or 0) > 1:
        values = {name: value for name, value in values.items() if name not in ("mfu", "hfu")}
    return in_percent(values)
