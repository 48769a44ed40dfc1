"""What a soak has shown: a table of faults, a picture of both runs, and figures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAT = ("rank_mib", "rank_files", "rank_threads", "shm_mib", "work_dir_files")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(events: Sequence[Mapping[str, Any]]) -> str:
    """One row for each kind of fault, in Markdown."""
    rows = [
        "| fault | tries | exit codes | seconds until all processes had gone | steps made again, at most | "
        "lost |",
        "|---|---|---|---|---|---|",
    ]
    for fault in sorted({event["fault"] for event in events}):
        its = [event for event in events if event["fault"] == fault]
        ended = [event for event in its if event["code"] is not None]
        codes = ", ".join(sorted({str(event["code"]) for event in ended})) or "it goes on"
        seconds = f"{max(event['seconds'] for event in ended):.0f}" if ended else ""
        again = max((event["lost"] for event in ended), default=0)
        trouble = "; ".join(text for event in its for text in event["problem"]) or "nothing"
        rows.append(f"| {fault} | {len(its)} | {codes} | {seconds} | {again} | {trouble} |")
    return "\n".join(rows)


def growth(vitals: Sequence[Mapping[str, float]], last: int) -> dict[str, list[float]]:
    """Of each figure the median of the second tenth of the steps and that of the last tenth."""
    early = [seen for seen in vitals if 0.1 * last <= seen["step"] < 0.2 * last]
    late = [seen for seen in vitals if seen["step"] >= 0.9 * last]
    return (
        {what: [statistics.median(seen[what] for seen in part) for part in (early, late)] for what in FLAT}
        if early and late
        else {}
    )


def draw(
    calm: Sequence[Mapping[str, float]],
    disturbed: Sequence[Mapping[str, float]],
    events: Sequence[Mapping[str, Any]],
    file: Path,
) -> None:
    """Steps, and what a run takes of its host, over time; faults as lines."""
    whats = {
        "step": "step",
        "rank_mib": "MiB of the largest rank",
        "rank_files": "its open files",
        "rank_threads": "its threads",
        "shm_mib": "MiB of /dev/shm",
        "work_dir_files": "files in the work directory",
    }
    figure, axes = plt.subplots(len(whats), 1, figsize=(10, 12), sharex=True, layout="constrained")
    for axis, (what, label) in zip(axes, whats.items(), strict=True):
        for vitals, name in ((calm, "undisturbed"), (disturbed, "disturbed")):
            axis.plot(
                [seen["seconds"] / 60 for seen in vitals],
                [seen[what] for seen in vitals],
                ".-",
                markersize=2,
                linewidth=0.8,
                label=name,
            )
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_title(f"{len(events)} faults")
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)
    plt.close(figure)
