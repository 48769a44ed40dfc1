"""report.html of one run, and the page that compares several.

In: work directories. Out: an HTML file that holds all that it shows.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from internseg_ds.errors import ConfigError
from internseg_ds.monitoring.run_starts import RunStart
from internseg_ds.output_files import whole_file
from internseg_ds.run_report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from internseg_ds.run_report.class_scores import SPARK_HEIGHT, SPARK_WIDTH, class_rows, confusion_of
from internseg_ds.run_report.comparison import Compared, class_table, comparing_charts, named_apart
from internseg_ds.run_report.image_strips import extreme_strips, fixed_strips
from internseg_ds.run_report.records import RunRecords, read_run
from internseg_ds.run_report.run_charts import run_charts
from internseg_ds.run_report.settings import differing, settings_of
from internseg_ds.run_report.summary import figures, moment, status
from internseg_ds.version import VERSION

PAGE = "report.html"
"""In the work directory."""
SHOWN_SKIPS = 100
TEMPLATES = Path(__file__).with_name("templates")


def write_run_page(work_dir: Path, out: Path | None = None) -> Path:
    """Writes the page of a run, into its work directory by default; returns its path. Raises OutputError."""
    return _write(out or work_dir / PAGE, "run.html", _of_run(read_run(work_dir)))


def write_comparison(work_dirs: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares runs; returns its path. Raises OutputError."""
    runs = [read_run(folder) for folder in work_dirs]
    names = named_apart(runs)
    compared = [Compared.of(run, name) for run, name in zip(runs, names, strict=True)]
    return _write(
        out,
        "comparison.html",
        {
            "title": f"{len(runs)} runs compared",
            "runs": compared,
            "figure_names": list(dict.fromkeys(name for each in compared for name in each.figures)),
            "charts": comparing_charts(runs, names),
            "classes": class_table(runs),
            "differing": differing([settings_of(run.config, run.ds_config) for run in runs]),
        },
    )


def check_work_dir(folder: Path) -> None:
    """Raises ConfigError where nothing of a run lies."""
    if not folder.is_dir():
        raise ConfigError(f"there is no work directory {folder}")
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{folder} has no metrics.jsonl, so no run has recorded anything there; name the work directory of a "
            "training (--work-dir of launch/train.py)"
        )


def _write(out: Path, template: str, values: dict[str, Any]) -> Path:
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    text = environment.get_template(template).render(
        **values,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        made=moment(time.time()),
        version=VERSION,
    )
    with whole_file(out) as file:
        file.write(text.encode("utf-8", errors="replace"))
    return out


def _of_run(run: RunRecords) -> dict[str, Any]:
    newest = run.evaluations[-1] if run.evaluations else None
    start: RunStart | None = run.starts[-1] if run.starts else None
    return {
        "title": run.name,
        "run": run,
        "status": status(run),
        "config": start.config if start is not None else "",
        "figures": figures(run),
        "start": start,
        "resume_command": start.resume_command if start is not None and not run.finished else "",
        "charts": run_charts(run),
        "classes": class_rows(run),
        "class_count": len(newest.classes) if newest is not None else 0,
        "spark_width": SPARK_WIDTH,
        "spark_height": SPARK_HEIGHT,
        "confusion": confusion_of(newest) if newest is not None else None,
        "fixed": fixed_strips(run.evaluations),
        "best": extreme_strips(newest, "best") if newest is not None else [],
        "worst": extreme_strips(newest, "worst") if newest is not None else [],
        "skipped": [_skipped(line) for line in run.skipped[-SHOWN_SKIPS:]],
        "restarts": [("" if each.time is None else moment(each.time), each) for each in run.restarts],
    }


def _skipped(line: dict[str, Any]) -> tuple[Any, str]:
    """The step, and which losses were not finite."""
    words = [
        f"rank {rank}: {each.get('loss')} of {', '.join(map(str, each.get('images', ())))}"
        for rank, of_rank in enumerate(line.get("ranks", ()))
        for each in of_rank
        if not _is_finite(each.get("loss"))
    ]
    return line.get("step", ""), "; ".join(words) or "none: the gradient was not finite"


def _is_finite(loss: Any) -> bool:
    try:
        return math.isfinite(float(loss))
    except (TypeError, ValueError):
        return False
