"""Weights & Biases: a run's records, tables, pictures with masks, settings and, where it is asked for, checkpoints.

A run has one id from its first start to its last: it is made of what tells runs apart, which is in the checkpoints.
Where the server cannot be reached, the run is kept in WORK_DIR/wandb as an offline one.
"""

import inspect
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from internseg_ds.config.engine_options import whole_number
from internseg_ds.errors import ConfigError, reason_of, unknown_key
from internseg_ds.monitoring.evaluation_record import NO_CLASS, EvaluatedImage, EvaluationRecord
from internseg_ds.monitoring.trackers.best import Best
from internseg_ds.monitoring.trackers.pictures import class_rows, confused, label_maps, rgb, sent_pictures
from internseg_ds.monitoring.trackers.tracker import RunInfo
from internseg_ds.monitoring.units import SCORE_OF_A_CLASS

log = logging.getLogger(__name__)

SETTINGS = {"silent": True, "console": "off", "init_timeout": 60.0, "finish_timeout": 15.0}
"""Of wandb's, where neither the config nor the environment says otherwise. It tells nothing on the console, which has
a line of ours, and keeps no copy of what goes there: printing would wait for it."""
FILES = ("train.log", "config.py", "ds_config.json")
"""Of the work directory, which the run gets at its end."""
TABLE_ROWS = 10_000
"""wandb shows no more of a table."""
MASK_CLASSES = 255
"""A mask has one byte for each pixel; the last value is that of no class."""
LARGE = 2**30
"""Bytes from which a checkpoint is not sent, only named."""


@dataclass(frozen=True)
class WandbOptions:
    """The arguments of mmcv's WandbLoggerHook and mmseg's MMSegWandbHook that count."""

    init: Mapping[str, Any] = field(default_factory=dict)
    """For wandb.init."""
    summaries: Mapping[str, str] = field(default_factory=dict)
    """define_metric_cfg: which summary of a metric to show."""
    files: bool = True
    """log_artifact: whether `FILES` are sent."""
    pictures: int = 4
    """num_eval_images."""
    checkpoints: bool = False
    """log_checkpoint."""
    scores_of_checkpoints: bool = False
    """log_checkpoint_metadata."""

    @classmethod
    def of_hook(cls, hook: Mapping[str, Any]) -> "WandbOptions":
        """Raises ConfigError for a value that cannot be meant."""
        for name in ("init_kwargs", "define_metric_cfg"):
            if not isinstance(hook.get(name) or {}, Mapping):
                raise ConfigError(f"{name}={hook[name]!r} of {hook['type']} must be a dict")
        whole_number(hook.get("num_eval_images", 0), f"num_eval_images of {hook['type']}", least=0)
        return cls(
            init=dict(hook.get("init_kwargs") or {}),
            summaries=dict(hook.get("define_metric_cfg") or {}),
            files=hook.get("log_artifact", True),
            pictures=hook.get("num_eval_images", cls.pictures),
            checkpoints=hook.get("log_checkpoint", False),
            scores_of_checkpoints=hook.get("log_checkpoint_metadata", False),
        )

    @property
    def mode(self) -> str:
        return self.init.get("mode") or os.environ.get("WANDB_MODE") or "online"

    def check(self) -> None:
        """Raises ConfigError where wandb cannot work: it is not installed, would refuse `init`, or would ask for an
        account that it does not know."""
        try:
            wandb = _wandb()
        except ImportError:
            raise ConfigError(
                "log_config.hooks names a wandb hook, but wandb is not installed; pip install wandb, or "
                "drop the hook"
            ) from None
        known = inspect.signature(wandb.init).parameters
        for key in self.init:
            if key not in known:
                raise unknown_key(key, known, "init_kwargs of a wandb hook in log_config.hooks")
        if self.mode == "online" and not wandb.api.api_key:
            raise ConfigError(
                "log_config.hooks names a wandb hook, but wandb knows no account here; run `wandb login`, "
                "or set WANDB_MODE=offline"
            )


class WandbTracker:
    """One run of wandb's."""

    name = "Weights & Biases"

    def __init__(self, options: WandbOptions) -> None:
        self._options = options
        self._wandb = _wandb()  # here, in the main thread: processes are forked while the tracker's works
        self._run: Any = None
        self._abandoned = False
        self._step, self._row = -1, -1
        self._hidden: set[str] = set()
        self._scores: tuple[int, dict[str, float]] = -1, {}
        self._saved: tuple[int, Path] | None = None
        self._best: Best | None = None

    def start(self, info: RunInfo) -> None:
        """Falls back to an offline run where there is no server."""
        self._work_dir = info.work_dir
        arguments = self._arguments(info)
        try:
            self._run = self._wandb.init(**arguments)
        except Exception as error:
            if self._abandoned or self._options.mode not in ("online", "shared"):
                raise
            log.warning("Weights & Biases is not reached, and the run is kept offline: %s", reason_of(error))
            # the process that wandb works with, which still tries to reach the server for this id
            with suppress(Exception):  # whatever has become of it
                self._wandb.teardown()
            self._run = self._wandb.init(**{**arguments, "mode": "offline"})
        self._row = self._run.starting_step - 1
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        for metric, summary in self._options.summaries.items():
            self._run.define_metric(metric, step_metric="step", summary=summary)
        self._say_where(info)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for name in values:
            if SCORE_OF_A_CLASS.fullmatch(name) and (prefix := name.partition(".")[0]) not in self._hidden:
                # hundreds of charts; the table of classes shows them, and a panel may still be made of one
                self._hidden.add(prefix)
                self._run.define_metric(f"{prefix}.*", step_metric="step", hidden=True)
        if "loss" not in values:
            self._scores = step, dict(values)
        self._log(step, values)

    def evaluation(self, evaluation: EvaluationRecord, best: Best | None) -> None:
        wandb = self._wandb
        shown = sent_pictures(evaluation, self._options.pictures)
        classes = wandb.Table(
            columns=["class", "IoU, %", "pixels"], data=[list(r) for r in class_rows(evaluation)]
        )
        pairs = wandb.Table(
            columns=["Actual", "Predicted", "nPredictions"],
            data=[list(row) for row in confused(evaluation, TABLE_ROWS)],
        )
        fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
        values = {
            "evaluation/classes": classes,
            "evaluation/confusion": wandb.plot_table("wandb/confusion_matrix/v1", pairs, fields),
        }
        if shown:
            # wandb shows a list of pictures rightly where all have one size
            height, width = np.max([each.image.shape[:2] for each in shown], axis=0)
            values["evaluation/pictures"] = [self._image(each, evaluation, height, width) for each in shown]
        self._log(evaluation.step, values)
        if best is not None:
            self._best = best
            self._run.summary.update({f"best/{best.name}": best.value, "best/step": best.step})
        if self._options.scores_of_checkpoints:
            self._send_checkpoint()

    def checkpoint(self, step: int, folder: Path) -> None:
        if self._options.checkpoints:
            self._send_checkpoint()  # the one before, which nobody has evaluated
            self._saved = step, folder
            if not self._options.scores_of_checkpoints or self._scores[0] == step:
                self._send_checkpoint()

    def close(self, *, failed: bool) -> None:
        if self._run is None:
            return
        self._send_checkpoint()
        if self._options.files:
            for name in FILES:
                if (self._work_dir / name).exists():
                    shutil.copy(self._work_dir / name, self._run.dir)  # wandb sends what is there
        self._run.finish(exit_code=int(failed))

    def abandon(self) -> None:
        """Ends the process that wandb works with: Python would wait for it at its end."""
        self._abandoned = True
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()
        self._wandb.teardown()

    def _arguments(self, info: RunInfo) -> dict[str, Any]:
        """Of wandb.init."""
        given = self._options.init
        settings = given.get("settings") or {}
        if not isinstance(settings, Mapping):
            settings = settings.model_dump(exclude_unset=True)
        ours = {key: value for key, value in SETTINGS.items() if f"WANDB_{key.upper()}" not in os.environ}
        config = {**info.config, "ds_config": dict(info.ds_config), "environment": list(info.environment)}
        arguments: dict[str, Any] = {"dir": str(info.work_dir), "config": config, "allow_val_change": True}
        if "WANDB_NAME" not in os.environ:
            arguments["name"] = info.name
        if info.run and "WANDB_RUN_ID" not in os.environ:
            arguments["id"] = info.run
        if info.start and not {"resume_from", "fork_from"} & given.keys():
            arguments["resume"] = "allow"
        return {**arguments, **given, "settings": {**ours, **settings}}

    def _say_where(self, info: RunInfo) -> None:
        run = self._run
        goes_on = f" goes on from step {info.start}" if info.start else ""
        if not run.offline:
            log.info("Weights & Biases: run %s%s, %s", run.id, goes_on, run.url or self._options.mode)
            return
        log.info(
            "Weights & Biases: run %s%s, offline; `wandb sync --id %s %s` sends it",
            run.id,
            goes_on,
            run.id,
            f"{info.work_dir}/wandb/offline-run-*-{run.id}",
        )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds to the row of this step. wandb takes no row behind one that it has: after a run went back to an
        earlier checkpoint, rows have higher numbers than steps for a while."""
        if step != self._step:
            self._step, self._row = step, max(step, self._row + 1)
        self._run.log({**values, "step": step}, step=self._row)

    def _image(self, shown: EvaluatedImage, evaluation: EvaluationRecord, height: int, width: int) -> Any:
        """height, width: to which the image is filled up below and on its right, black and without a class."""
        classes = dict(enumerate(evaluation.classes))
        caption = shown.name if shown.score is None else f"{shown.name}, mIoU {100 * shown.score:.2f} %"
        below_right = [(0, height - shown.image.shape[0]), (0, width - shown.image.shape[1])]
        picture = np.pad(rgb(shown), [*below_right, (0, 0)])
        if len(classes) > MASK_CLASSES:
            return self._wandb.Image(picture, caption=caption)
        labels = {**classes, MASK_CLASSES: "no class"}
        masks = {
            name: {
                "mask_data": np.pad(
                    _bytes_of_mask(label_map, len(classes)), below_right, constant_values=MASK_CLASSES
                ),
                "class_labels": labels,
            }
            for name, label_map in zip(("truth", "prediction"), label_maps(shown), strict=True)
        }
        return self._wandb.Image(picture, caption=caption, masks=masks)

    def _send_checkpoint(self) -> None:
        """The last one that was saved, unless it is sent."""
        if self._saved is None:
            return
        (step, folder), self._saved = self._saved, None
        scored, scores = self._scores
        artifact = self._wandb.Artifact(
            f"run-{self._run.id}-checkpoint",
            type="model",
            metadata={"step": step, "path": str(folder), **(scores if scored == step else {})},
        )
        try:
            if sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LARGE:
                artifact.add_dir(str(folder))  # copied: the run may remove its checkpoint before it is sent
            else:
                artifact.add_reference(f"file://{folder.resolve()}", checksum=False)
        except (OSError, ValueError) as error:  # it is removed already
            log.warning("Weights & Biases lacks the checkpoint of step %d: %s", step, reason_of(error))
            return
        best = self._best is not None and self._best.step == step
        self._run.log_artifact(artifact, aliases=["latest", f"step_{step}", *(["best"] if best else [])])


def _bytes_of_mask(labels: np.ndarray, classes: int) -> np.ndarray:
    """(h, w) uint8."""
    return np.where((labels == NO_CLASS) | (labels >= classes), MASK_CLASSES, labels).astype(np.uint8)


def _wandb() -> Any:
    """The package. Its own telemetry, which would hold up the end of a process where there is no network, is off
    unless the environment says otherwise."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb
