"""How a run was started, each time: WORK_DIR/starts.jsonl, a line for each start and each resume.

It has what the log says at a start (versions, hosts, findings about the data), for whoever reads a run later:
its page, trackers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internseg_ds.monitoring.buffered_lines import BufferedLines
from internseg_ds.monitoring.json_lines import read_json_lines

if TYPE_CHECKING:  # it loads torch, which who reads starts can do without
    from internseg_ds.config.lr_schedule import LrSchedule

FILE = "starts.jsonl"
"""In the work directory."""
POINTS = 80
"""Steps for which learning rates are noted, beside those of the warmup."""
POINTS_OF_WARMUP = 6
DECAY = re.compile(r", (?:no )?decay\b")
"""What tells apart the names of groups with and without weight decay."""


@dataclass(frozen=True)
class LearningRates:
    """Those of the parameters with one base learning rate, by the schedule."""

    name: str
    """"layer 3"; of several that share a rate, all of their names."""
    parameters: int
    steps: Sequence[int]
    """Numbers of steps, as records count them: from 1."""
    rates: Sequence[float]
    """Of each of these steps, with 5 digits."""


@dataclass(frozen=True)
class RunStart:
    """One start. What is text is as the log has it."""

    time: float
    """Seconds since 1970."""
    step: int
    """That the run goes on from: 0 for one that starts anew."""
    max_steps: int
    config: str
    """The file that the run was given."""
    environment: Sequence[str]
    """Versions; date, seed and hosts; the command."""
    resume_command: str
    """What goes on with this run; "" where it was started from Python."""
    data: Mapping[str, str]
    """What is known of the data, by what it is."""
    warnings: Sequence[str]
    """What the checks found odd, about the config and the data."""
    notes: Sequence[str]
    learning_rates: Sequence[LearningRates]


def write_start(work_dir: Path, start: RunStart) -> None:
    """Adds the start to the file. A full disk is warned of, and no error."""
    BufferedLines(work_dir / FILE).add(json.dumps(asdict(start)) + "\n")


def read_starts(work_dir: Path) -> list[RunStart]:
    """All starts, in their order; lines that are none, as those of a run that was killed while it wrote, are
    left out."""
    noted = read_json_lines(work_dir / FILE)
    return [start for each in noted if (start := _start(each)) is not None]


def _start(noted: Mapping[str, Any]) -> RunStart | None:
    try:
        known = {field.name: noted[field.name] for field in fields(RunStart)}
        rates = [LearningRates(**each) for each in known.pop("learning_rates")]
        start = RunStart(**known, learning_rates=rates)
    except (KeyError, TypeError):
        return None
    return start if _is_sound(start) else None


def _is_sound(start: RunStart) -> bool:
    """Whether its values are of the types that they should be."""
    texts = (start.config, start.resume_command)
    lists = (start.environment, start.warnings, start.notes)
    return (
        type(start.step) is type(start.max_steps) is int
        and isinstance(start.time, (int, float))
        and math.isfinite(start.time)
        and isinstance(start.data, dict)
        and all(isinstance(each, list) for each in lists)
        and all(isinstance(each, str) for each in (*texts, *chain(*lists), *chain(*start.data.items())))
    )


def learning_rates(
    schedule: "LrSchedule", groups: Sequence[Mapping[str, Any]], sizes: Sequence[int], start: int
) -> list[LearningRates]:
    """Those from step `start` + 1 to the last, from the highest base rate to the lowest.

    groups: each with its lr and name, as `parameter_groups` makes them; sizes: the number of parameters of
    each.
    """
    steps = _noted_steps(schedule, start)
    by_rate: dict[float, dict[str, int]] = {}
    for group, size in zip(groups, sizes, strict=True):
        names = by_rate.setdefault(group["lr"], {})
        name = DECAY.sub("", group["name"])
        names[name] = names.get(name, 0) + size
    return [
        LearningRates(
            name=", ".join(names),
            parameters=sum(names.values()),
            steps=steps,
            rates=[float(f"{schedule.lr(step - 1, base):.5g}") for step in steps],
        )
        for base, names in sorted(by_rate.items(), reverse=True)
    ]


def _noted_steps(schedule: "LrSchedule", start: int) -> list[int]:
    last, warmup = schedule.max_steps, min(schedule.settings.get("warmup_iters") or 0, schedule.max_steps)

    def evenly(first: int, end: int, points: int) -> set[int]:
        return {first + round(number * (end - first) / (points - 1)) for number in range(points)}

    steps = evenly(min(start + 1, last), last, POINTS)
    if warmup > start:
        steps |= evenly(start + 1, warmup, POINTS_OF_WARMUP) | {min(warmup + 1, last)}
    return sorted(steps)
