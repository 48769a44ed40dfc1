"""The curve of a run as a picture: loss and score over steps, from metrics.jsonl."""

from pathlib import Path

from internseg_ds.monitoring.json_lines import read_json_lines
from internseg_ds.monitoring.units import todays
from internseg_ds.output_files import whole_file


def draw_curves(metrics: Path, picture: Path, score: str = "mIoU") -> None:
    """Draws the PNG `picture` from the records of `metrics` (JSON lines with step, loss, lr, and `score` where
    the run evaluated, of any version). Skips lines that are no records. Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [todays(record) for record in read_json_lines(metrics) if "step" in record]
    losses = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    scores = [(record["step"], record[score]) for record in records if record.get(score) is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="training loss")
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="tab:blue", label="loss")
    axes.yaxis.label.set_color("tab:blue")
    axes.grid(alpha=0.3)
    if scores:
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", label=score)
        right.set_ylabel(f"{score} on the validation set, %", color="tab:orange")
        right.set_ylim(bottom=0)
    with whole_file(picture) as file:
        figure.savefig(file, format="png")
