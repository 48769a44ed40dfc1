"""Draws docs/growth.png from the points that benchmarks/growth.py appended to a file: seconds by the clock
over processes, else seconds of CPU work.

python docs/draw_growth.py points.jsonl
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

CURVES = ("model", "image", "classes", "world", "groups")
TITLES = {
    "model": "model size",
    "image": "image size",
    "classes": "classes",
    "world": "processes, on 2 cores",
    "groups": "parameter groups",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("points", type=Path, metavar="points.jsonl")
    points: Path = parser.parse_args().points
    rows = [json.loads(line) for line in points.read_text().splitlines()]
    figure, axes = plt.subplots(2, len(CURVES), figsize=(15, 5.5), sharex="col")
    for column, curve in enumerate(CURVES):
        found = [row for row in rows if row["curve"] == curve]
        if not found:
            raise SystemExit(
                f"{points} has no points of {curve!r}; run benchmarks/growth.py {curve} --out {points}"
            )
        for colour, name in enumerate(dict.fromkeys(row["series"] for row in found)):
            series = [row for row in found if row["series"] == name]
            xs = [row["x"] for row in series]
            for line, key in enumerate(("seconds" if curve == "world" else "cpu_seconds", "own_gib")):
                panel, ys = axes[line, column], [row[key] for row in series]
                panel.plot(xs, ys, color=f"C{colour}", marker="o", markersize=4, label=name)
                if curve in ("model", "image"):
                    panel.plot(
                        xs, [ys[0] * x / xs[0] for x in xs], color="0.6", linestyle=":", label="linear"
                    )
        for line, title in enumerate(("seconds per step", "GiB of a process")):
            panel = axes[line, column]
            if curve in ("model", "image"):
                panel.set(xscale="log", yscale="log")
                panel.xaxis.set_minor_formatter("")
            else:
                panel.set_ylim(bottom=0)
            if curve == "world":
                panel.set_xticks(sorted({row["x"] for row in found}))
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(title)
        axes[0, column].set_title(TITLES[curve])
        axes[1, column].set_xlabel(found[0]["what"])
        axes[0, column].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "growth.png", dpi=100)


if __name__ == "__main__":
    main()
