"""Draws the two pictures of docs/architecture.md: the rooms of the package, out of its imports, and one step of a
training.

    python -m docs.draw_architecture
"""

import argparse
import ast
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import internseg_ds

PACKAGE = Path(internseg_ds.__file__).parent
FOLDER = Path(__file__).parent
ROWS = [
    ("cli",),
    ("data_report",),
    ("training",),
    ("run_report",),
    ("evaluation",),
    ("preflight",),
    ("monitoring", "planning"),
    ("optimization",),
    ("distributed",),
    ("config", "checkpoints", "data"),
    ("models", "synthetic"),
]
"""From the highest room: each imports from lower rows, and from its right neighbours."""
INK, PAPER, LINE = "#1f2933", "#f5f7fa", "#9aa5b1"
COLOURS = [
    "#dbeafe",
    "#dcfce7",
    "#fef3c7",
    "#fae8ff",
    "#e0f2fe",
    "#ffe4e6",
    "#ede9fe",
    "#ecfccb",
    "#f1f5f9",
    "#ffedd5",
    "#ccfbf1",
]


def title_of(room: str) -> str:
    """The first sentence of the room's docstring."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    return text.split(". ")[0].split(".\n")[0].rstrip(".").replace("\n", " ")


def files_of(room: str) -> list[str]:
    """Modules and folders of a room, by name."""
    files = [path.stem for path in (PACKAGE / room).glob("[!_]*.py")]
    folders = [f"{path.parent.name}/" for path in (PACKAGE / room).glob("*/__init__.py")]
    return sorted(files) + sorted(folders)


def wrapped(words: list[str], columns: int) -> str:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > columns:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    return "\n".join(lines)


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=LINE))


def canvas(width: float, height: float) -> Axes:
    figure, axes = plt.subplots(figsize=(width, height), facecolor="white")
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return axes


def draw_rooms(file: Path) -> None:
    """One box for each room, with its files; a room imports from those below it and to the right of it."""
    width, gap = 12.0, 0.14
    heights = [{1: 0.92, 2: 1.3, 3: 1.75}[len(rooms)] for rooms in ROWS]
    height = sum(heights) + gap * (len(ROWS) + 1)
    axes = canvas(width, height)
    y = height
    for number, rooms in enumerate(ROWS):
        y -= heights[number] + gap
        top = y + heights[number] - 0.12
        each = (width - 0.9 - gap * (len(rooms) - 1)) / len(rooms)
        for place, room in enumerate(rooms):
            x = 0.7 + place * (each + gap)
            box(axes, x, y, each, heights[number], COLOURS[number])
            axes.text(x + 0.12, top, room, weight="bold", size=12, color=INK, va="top")
            beside = 1.55 if each > 5 else 0.12  # a narrow box has its title below the name
            below = 0.02 if each > 5 else 0.26
            title = textwrap.fill(title_of(room), int((each - beside) * 13))
            axes.text(x + beside, top - below, title, size=8, color=INK, va="top")
            names = wrapped(files_of(room), int(each * 13.5))
            axes.text(x + 0.12, y + 0.1, names, size=7.5, color="#52606d", va="bottom", family="monospace")
    arrow = FancyArrowPatch(
        (0.35, height - 0.2), (0.35, 0.2), arrowstyle="-|>", mutation_scale=18, color=LINE
    )
    axes.add_patch(arrow)
    axes.text(0.2, height / 2, "imports", rotation=90, size=10, color="#52606d", va="center", ha="center")
    axes.figure.savefig(file, dpi=110)
    plt.close(axes.figure)


STEP = [
    ("data", "next micro-batch of the seeded stream", "data/loading, data/sampler"),
    (
        "forward",
        "ZeRO-3 gathers each block; backbone in bf16, heads in fp32",
        "distributed/ precision, models/",
    ),
    (
        "backward",
        "blocks computed again where chosen; gradients reduced",
        "models/ activation_ checkpointing",
    ),
    ("update", "flags sent; clipping; Adam on this rank's elements", "optimization/ ranged_adam"),
    ("agree", "flags read: stop? bad images? step skipped?", "training/ nonfinite_steps, stop_requests"),
    ("record", "means over ranks, speed, stragglers, spikes", "training/ step_monitors, monitoring/"),
    ("save", "each rank its files; manifest; rename; `latest`", "training/ checkpointer, checkpoints/"),
    ("evaluate", "windows, confusion matrix, `best`, report", "evaluation/"),
]
REPEATED = 4
"""Parts of the step that each micro-batch has."""


def draw_step(file: Path) -> None:
    """The parts of a step from left to right, with the rooms that they lie in."""
    width, height = 13.2, 3.3
    axes = canvas(width, height)
    each = (width - 0.3) / len(STEP)
    for number, (name, what, where) in enumerate(STEP):
        x = 0.15 + number * each
        always = number < 5
        box(axes, x, 1.0, each - 0.16, 1.55, COLOURS[number] if always else PAPER)
        axes.text(x + 0.08, 2.44, name, weight="bold", size=11, color=INK, va="top")
        axes.text(x + 0.08, 2.12, textwrap.fill(what, 23), size=6.9, color=INK, va="top")
        axes.text(
            x + 0.08,
            1.08,
            textwrap.fill(where, 19),
            size=6.9,
            color="#52606d",
            va="bottom",
            family="monospace",
        )
        if number:
            start = (x - 0.17, 1.78)
            axes.add_patch(
                FancyArrowPatch(start, (x + 0.01, 1.78), arrowstyle="-|>", mutation_scale=9, color=INK)
            )
    loop = 0.15 + REPEATED * each - 0.16
    for x, y, to_x, to_y in ((loop, 2.62, loop, 2.9), (loop, 2.9, 0.15, 2.9), (0.15, 2.9, 0.15, 2.6)):
        style = "-|>" if to_y == 2.6 else "-"
        axes.add_patch(
            FancyArrowPatch(
                (x, y), (to_x, to_y), arrowstyle=style, mutation_scale=9, color=INK, shrinkA=0, shrinkB=0
            )
        )
    axes.text(
        loop / 2, 2.97, "for each micro-batch of the step", size=8.5, color=INK, ha="center", va="bottom"
    )
    axes.text(0.15 + 5 * each, 2.97, "when they are due", size=8.5, color=INK, va="bottom")
    axes.plot([0.15, width - 0.3], [0.72, 0.72], color=LINE, linewidth=1)
    watchdog = "distributed/watchdog: every rank reports once a second where it stands; one that dies or hangs is named and all end"
    axes.text(0.15, 0.6, watchdog, size=8.5, color="#52606d", va="top")
    axes.figure.savefig(file, dpi=110)
    plt.close(axes.figure)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    draw_rooms(FOLDER / "rooms.png")
    draw_step(FOLDER / "step.png")
