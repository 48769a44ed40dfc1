"""One page about the data of an experiment: findings, histogram of classes, contact sheets, copies. It is one file that
asks no network for anything.

In: a `Report`. Out: an HTML file.
"""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.checks.scan import Scanned
from internseg_ds.data.checks.suggestions import mean_and_std, median_frequency_weights
from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data_report.contact_sheet import Shown, colours_of, contact_sheet, scored_sheet, thumbnail
from internseg_ds.data_report.doctor import Report
from internseg_ds.errors import OutputError

SHOWN = 12
"""Images of each contact sheet, and pairs of each kind."""
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(report: Report, experiment: Experiment, out: Path) -> Path:
    """Raises OutputError where `out` cannot be written."""
    train = report.scanned.get("data.train")
    weights = (
        median_frequency_weights(train.labels, len(train.parts[0].CLASSES))
        if train is not None and train.parts and train.labels.maps
        else []
    )
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        name=experiment.path,
        counts=[f"{what}: {len(seen.looks):,} of {seen.total:,}" for what, seen in report.scanned.items()],
        wrong=len(report.wrong),
        odd=len(report.odd),
        findings=[*report.wrong, *report.odd],
        sets=[_classes(what, seen) for what, seen in report.scanned.items() if seen.labels.maps],
        weights=[round(weight, 4) for weight in weights],
        sheet=_sheet(report, "data.train", contact_sheet),
        scored=_sheet(report, "data.val", scored_sheet),
        pairs=_pairs(report),
    )
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--page: {out} cannot be written: {error}") from None
    return out


def _sheet(
    report: Report, what: str, draw: Callable[[SegmentationDataset, int], Iterator[Shown]]
) -> list[dict[str, Any]]:
    dataset = report.datasets.get(what)
    if dataset is None or not len(dataset):
        return []
    return [
        {"file": shown.file, "fault": shown.fault, "disk": _png(shown.disk), "network": _png(shown.network)}
        for shown in draw(dataset, SHOWN)
    ]


def _pairs(report: Report) -> list[dict[str, Any]]:
    """Images that stand in both data sets, some of those of the same bytes and of those that look alike."""
    return [
        {
            "how": how,
            "images": [{"file": file, "picture": _png(thumbnail(file))} for file in pair],
        }
        for how, pairs in (("the same bytes", report.duplicates.same), ("alike", report.duplicates.alike))
        for pair in pairs[:SHOWN]
    ]


def _png(image: np.ndarray | None) -> str:
    """A picture as a data URL."""
    if image is None:
        return ""
    return "data:image/png;base64," + base64.b64encode(cv2.imencode(".png", image)[1].tobytes()).decode()


def _classes(what: str, seen: Scanned) -> dict[str, Any]:
    tally, part = seen.labels, seen.parts[0]
    total = sum(tally.pixels.values())
    most = max(1, *(tally.pixels[index] for index in range(len(part.CLASSES))))
    weights = median_frequency_weights(tally, len(part.CLASSES))
    colours = colours_of(part)
    rows = [
        {
            "index": index,
            "name": name,
            "share": f"{tally.pixels[index] / total:.3%}",
            "maps": f"{tally.images_with[index]:,}",
            "weight": f"{weights[index]:.3g}",
            "width": round(100 * tally.pixels[index] / most, 1),
            "colour": f"rgb({', '.join(str(int(value)) for value in colours[index])})",
        }
        for index, name in sorted(enumerate(part.CLASSES), key=lambda item: -tally.pixels[item[0]])
        if tally.pixels[index]
    ]
    absent = [str(name) for index, name in enumerate(part.CLASSES) if not tally.pixels[index]]
    ignored = tally.pixels[part.ignore_index] / total
    return {
        "what": what,
        "rows": rows,
        "summary": f"{tally.maps:,} label maps; {ignored:.2%} of their pixels are of no class",
        "facts": [*([("classes that never occur", ", ".join(absent))] if absent else []), *_facts(seen)],
    }


def _facts(seen: Scanned) -> list[tuple[str, str]]:
    sizes = sorted((look.head.stored for look in seen.looks if look.head), key=lambda size: size[0] * size[1])
    modes = sorted({f"{look.head.format} {look.head.mode}" for look in seen.looks if look.head})
    facts = [
        (
            "numbers in the label maps, as they are read",
            ", ".join(map(str, sorted(seen.labels.numbers)[:300])),
        )
    ]
    facts.append(("label maps are stored as", ", ".join(sorted(seen.labels.storage))))
    facts.append(("images are stored as", ", ".join(modes)))
    if sizes:
        words = [" x ".join(map(str, sizes[place])) for place in (0, len(sizes) // 2, -1)]
        facts.append(("smallest, middle and largest image, height x width", ", ".join(words)))
    if (found := mean_and_std(seen.looks)) is not None:
        channels = "each channel" if seen.looks[0].raster else "R, G, B"
        facts += [
            (name, ", ".join(f"{value:.2f}" for value in values))
            for name, values in zip((f"mean of {channels}", "standard deviation"), found)
        ]
    return facts
