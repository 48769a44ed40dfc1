"""The model card of an exported segmentor, written from its run: data, recipe, scores, versions, licence.

In: a checkpoint's note, its experiment, and what its work directory has. Out: the text of README.md, and pictures.
What is not known is said to be so.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from internseg_ds.config.experiment import Experiment
from internseg_ds.data.entries import leaf_datasets
from internseg_ds.evaluation.class_table import is_of_one_class
from internseg_ds.models.backbone import checkpoint_of
from internseg_ds.monitoring.units import in_cell
from internseg_ds.planning.image_sizes import crop_size
from internseg_ds.synthetic.generated_ade20k import MARKER

PICTURE, CONFUSION = "prediction.png", "confusion.png"
PACKAGES = ("internseg-ds", "torch", "transformers", "deepspeed", "mmsegmentation", "mmcv-full")
VERSIONS = re.compile(r"\bpython \d.*\binternseg_ds \S+.*")
"""In the first lines of a run's log."""
LICENCE = re.compile(r"^license(?:_name)?:\s*['\"]?([\w.+-]+)", re.MULTILINE)
"""In the header of a model card."""
AGREE = 1e-3
"""How far apart two evaluations of one checkpoint may be."""


@dataclass(frozen=True)
class RunRecord:
    """What is known of the run that a checkpoint is of."""

    scores: dict[str, float] = field(default_factory=dict)
    """mmseg's names (mIoU, IoU.wall, ...), 0 to 1."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """Name in the folder -> PNG."""
    versions: str | None = None
    """Those of the training."""
    batch: int | None = None
    """Images of a step."""


def record_of(save: Path, manifest: Mapping[str, Any], batch: int | None) -> RunRecord:
    """save: the checkpoint's directory, WORK_DIR/checkpoints/iter_N. batch: images of a step where the config says
    so.

    WORK_DIR/evaluation counts where it is of this checkpoint: its mIoU is that of the note, or, where that has
    none, it is younger than the checkpoint.
    """
    work_dir = save.parent.parent
    scores = {name: float(value) for name, value in manifest.get("metrics", {}).items()}
    results = work_dir / "evaluation" / "results.json"
    found, pictures = _results(results), {}
    if found and (
        abs(scores["mIoU"] - found.get("mIoU", -1)) <= AGREE
        if "mIoU" in scores
        else results.stat().st_mtime > manifest.get("saved_at", float("inf"))
    ):
        scores = found | scores
        pictures = _pictures(work_dir / "evaluation")
    log, ds = work_dir / "train.log", work_dir / "ds_config.json"
    lines = VERSIONS.findall(log.read_text(errors="replace")) if log.is_file() else []
    if batch is None and ds.is_file():
        batch = _object(ds).get("train_batch_size")
    return RunRecord(scores, pictures, lines[-1] if lines else None, batch)


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _results(file: Path) -> dict[str, float]:
    """The scores in an evaluation's results.json, by mmseg's names, 0 to 1; of older files, which name no unit, as
    they are."""
    content = _object(file)
    whole = 100 if content.get("unit") == "percent" else 1
    classes = content.pop("classes", {})
    found = {name: value for name, value in content.items() if isinstance(value, float)} | {
        f"{score}.{name}": value for name, scores in classes.items() for score, value in scores.items()
    }
    return {name: round(value / whole, 6) for name, value in found.items()}


def _pictures(folder: Path) -> dict[str, bytes]:
    """An image with its ground truth and prediction, and the confusion matrix, where an evaluation drew them."""
    drawn = [*sorted(folder.glob("best/*.png")), *sorted(folder.glob("worst/*.png"))]
    files = {PICTURE: drawn[0] if drawn else None, CONFUSION: folder / CONFUSION}
    return {name: file.read_bytes() for name, file in files.items() if file is not None and file.is_file()}


def starting_weights(experiment: Experiment) -> str | None:
    """Where the run's weights came from, as its config says."""
    model = experiment.model
    named = (
        experiment.load_from,
        model.get("pretrained"),
        model.backbone.get("pretrained"),
        checkpoint_of(model.backbone.get("init_cfg")),
    )
    return next((str(source) for source in named if source), None)


def licence_of(weights: str | None) -> str | None:
    """The licence that the model card beside starting weights names; None where nobody says."""
    if weights is None:
        return None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    card = folder / "README.md"
    found = LICENCE.findall(_header(card.read_text(errors="replace"))) if card.is_file() else []
    return next((name for name in reversed(found) if name != "other"), None)


def _header(text: str) -> str:
    parts = text.split("---", 2)
    return parts[1] if len(parts) == 3 and not parts[0].strip() else ""


def model_card(
    name: str,
    experiment: Experiment,
    manifest: Mapping[str, Any],
    record: RunRecord,
    classes: Sequence[str],
    usage: str,
) -> str:
    """The text of README.md. name: of the model. usage: Python that loads it and segments an image."""
    weights = starting_weights(experiment)
    licence = licence_of(weights)
    head, data = experiment.model.decode_head, _data(experiment)
    kinds = [part.type for part in (experiment.model.backbone, *(head if isinstance(head, list) else [head]))]
    sections = [
        _yaml(name, data, licence, record),
        f"# {name}\n\nSemantic segmentation into {len(classes)} classes: {' with '.join(kinds)}, trained on {data} "
        f"for {manifest['step']:,} of {experiment.max_steps:,} steps.",
        *(
            [f"![an image, its ground truth and the prediction]({PICTURE})"]
            if PICTURE in record.pictures
            else []
        ),
        f"## Use\n\n```python\n{usage.strip()}\n```",
        f"## Scores\n\n{_scores(record, classes)}",
        f"## Training\n\n{_recipe(experiment, record, data)}",
        f"## Weights and licence\n\n{_licence(weights, licence)}",
        f"## Versions\n\n{_versions(record)}",
    ]
    return "\n\n".join(sections) + "\n"


def _yaml(name: str, data: str, licence: str | None, record: RunRecord) -> str:
    """The header by which the hub files a model; JSON is YAML too."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", "internseg_ds"],
    }
    if licence is not None:
        fields["license"] = licence
    if "mIoU" in record.scores:
        result = {
            "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
            "dataset": {"type": re.sub(r"\W+", "-", data).strip("-").lower(), "name": data},
            "metrics": [{"type": "mean_iou", "name": "mIoU", "value": round(100 * record.scores["mIoU"], 2)}],
        }
        fields["model-index"] = [{"name": name, "results": [result]}]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---"


def _data(experiment: Experiment) -> str:
    """The kinds of data sets in `data.train`; generated scenes and own data are called that."""
    return ", ".join(dict.fromkeys(map(_kind, leaf_datasets(experiment.train))))


def _kind(entry: Mapping[str, Any]) -> str:
    kind = str(entry.get("type", "data"))
    if any((Path(root) / MARKER).is_file() for root in _roots_of(entry)):
        return f"generated scenes in the layout of {kind.removesuffix('Dataset')}"
    return {"FolderDataset": "own data", "CustomDataset": "own data"}.get(
        kind, kind.removesuffix("Dataset") or kind
    )


def _roots_of(entry: Mapping[str, Any]) -> list[str]:
    given = entry.get("data_root") or entry.get("root") or []
    return [given] if isinstance(given, str) else list(given)


def _scores(record: RunRecord, classes: Sequence[str]) -> str:
    if not record.scores:
        return "This checkpoint was not evaluated in its run."
    totals = {name: value for name, value in record.scores.items() if not is_of_one_class(name)}
    lines = [
        ", ".join(f"{name} {100 * value:.2f} %" for name, value in totals.items())
        + ", on the validation set."
    ]
    kinds = list(dict.fromkeys(name.partition(".")[0] for name in record.scores if is_of_one_class(name)))
    if kinds:
        lines += ["", f"| class | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        cells = {name: [record.scores.get(f"{kind}.{name}") for kind in kinds] for name in classes}
        scored = {name: row for name, row in cells.items() if any(cell is not None for cell in row)}
        for name, row in scored.items():
            shown = " | ".join("" if cell is None else f"{100 * cell:.2f}" for cell in row)
            lines.append(f"| {in_cell(name)} | {shown} |")
        absent = len(cells) - len(scored)
        lines += ["", "In percent. A class without Acc is labelled in no image of the validation set."]
        if absent:
            lines[-1] += (
                f" {absent:,} of the {len(cells):,} classes are neither labelled nor predicted there."
            )
    if CONFUSION in record.pictures:
        lines += ["", f"![which classes the pixels of each class are predicted as]({CONFUSION})"]
    return "\n".join(lines)


def _recipe(experiment: Experiment, record: RunRecord, data: str) -> str:
    height, width = crop_size(experiment)
    optimizer, policy = experiment.optimizer, (experiment.cfg.get("lr_config") or {}).get("policy")
    test = experiment.model.test_cfg
    windows = (
        f"windows of {test.crop_size[0]} x {test.crop_size[1]} every {test.stride[0]} x {test.stride[1]} pixels"
        if test.mode == "slide"
        else "whole images"
    )
    rows = {
        "data": f"{data}, {_roots(experiment)}",
        "crops": f"{height} x {width} pixels",
        "evaluation": windows,
        "optimizer": f"{optimizer.get('type')}, learning rate {optimizer.get('lr')}, weight decay "
        f"{optimizer.get('weight_decay', 0)}",
        "schedule": f"{policy}, {experiment.max_steps:,} steps",
        "batch": "not known" if record.batch is None else f"{record.batch} images",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{table}\n\nThe whole config is in training_config.py."


def _roots(experiment: Experiment) -> str:
    """What the data sets' folders are called; where they lie is nobody's business."""
    roots = [root for entry in leaf_datasets(experiment.train) for root in _roots_of(entry)]
    named = ", ".join(filter(None, dict.fromkeys(Path(root).name for root in roots)))
    return f"in a folder called {named}" if named else "whose folder the config does not name"


def _licence(weights: str | None, licence: str | None) -> str:
    if weights is None:
        return "Trained from random weights, or from weights that the config does not name."
    text = f"The training started from {Path(weights).name}"
    if licence is not None:
        return (
            f"{text}, whose model card names the licence {licence}; it holds for what is derived from them."
        )
    return (
        f"{text}. Their licence is not known: no model card lies beside them. Look at their publisher's terms before "
        "you pass this model on."
    )


def _versions(record: RunRecord) -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    lines = [f"Written with {', '.join(found)}."]
    if record.versions:
        lines.insert(0, f"Trained with {record.versions}.")
    return "\n\n".join(lines)
