"""What launch/export.py does, as a Python function: a trained segmentor becomes a file that runs without this
package.

In: weights with the config that is stored with them. Out: NAME.onnx or a TorchScript NAME.pt, held against the
segmentor. What cannot be exported is refused before any weights are read; a file that computes something else is not
left. It runs in one process, on the CPU, in fp32. What memory and disk it takes, it says before it starts.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmcv import Config

from internseg_ds.checkpoints.weights import Weights
from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.device_memory import free_memory
from internseg_ds.distributed.precision import buffers_to_fp32
from internseg_ds.distributed.weight_loading import match_segmentor
from internseg_ds.errors import ConfigError, OutputError, reason_of
from internseg_ds.evaluation.deployment import onnx_file, torchscript_file
from internseg_ds.evaluation.deployment.comparison import TOLERANCE, largest_difference
from internseg_ds.evaluation.deployment.description import described, normalization
from internseg_ds.evaluation.deployment.graph import (
    Dynamic,
    Input,
    SegmentorGraph,
    captured,
    values_of,
    without_values,
)
from internseg_ds.evaluation.inference import with_weights
from internseg_ds.evaluation.predict import classes_of
from internseg_ds.evaluation.segmenter import open_trained
from internseg_ds.models.backbone import patch_size
from internseg_ds.output_files import check_writable
from internseg_ds.progress import stage

log = logging.getLogger(__name__)

FORMATS: dict[str, ModuleType] = {".onnx": onnx_file, ".pt": torchscript_file}
"""What each ending of a file means."""
COARSEST = 32
"""Pixels whose multiples the sides are, where they may differ and the backbone has no patches: the stride of a
hierarchical backbone's last map. torch cannot follow sizes that are rounded on the way."""
# measured (docs/using_models.md)
PROCESS = 0.9 * 2**30
"""Bytes of host memory that Python, imports and the program of a segmentor take."""
LONGEST_REASON = 300
"""Characters of torch's reason why a model cannot be exported."""


def export_segmentor(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    size: Sequence[int] | None = None,
    dynamic: Dynamic = "none",
    ema: bool = False,
    overwrite: bool = False,
    check: bool = True,
) -> list[Path]:
    """Write a segmentor as ONNX (`out` ends in .onnx) or TorchScript (.pt); returns the files.

    source, config, ema: as of `Segmenter.from_pretrained`. size: (height, width) of the images, default the window of
    the evaluation. dynamic: what of them may differ from call to call: "batch", or "size" (and batch). check: as of
    `open_weights`.

    Raises ConfigError, CheckpointError for what cannot work, before weights are read; OutputError when the file cannot
    be written, or its logits differ from the segmentor's by more than TOLERANCE.
    """
    target = Path(out)
    file_format = _format_of(target)
    _check_target(target, overwrite)
    experiment, weights, meta = open_trained(source, config=config, ema=ema, check=check)
    experiment = _in_fp32(experiment)
    segmentor: Any = build_on_meta(experiment.model).eval()
    given = _input(experiment, patch_size(segmentor.get_submodule("backbone")), size, dynamic)
    file_format.check(given)
    match_segmentor(segmentor, weights)
    _tell_needs(target, segmentor, file_format)
    description = described(experiment, *classes_of(experiment, meta), given, segmentor.out_channels)
    with stage("making the graph"):
        made = _prepared(segmentor, experiment, given, file_format)
    graph = _with_values(experiment, weights)
    with _beside(target) as partial:
        with stage(f"writing {target}"):
            files = file_format.write(made, values_of(graph), description, partial)
        del made
        with stage("checking the file against the segmentor"):
            _check(file_format, partial, graph, given, target)
        for file in files:
            file.replace(target.with_name(file.name))
        if len(files) == 1:  # an overwritten file's weights
            onnx_file.data_file(target).unlink(missing_ok=True)
    return [target.with_name(file.name) for file in files]


def _format_of(target: Path) -> ModuleType:
    found = FORMATS.get(target.suffix)
    if found is None:
        raise ConfigError(
            f"{target}: the ending says what is written, and {target.suffix or 'none'!r} is none of "
            f"{', '.join(FORMATS)}; write NAME.onnx, or NAME.pt for TorchScript"
        )
    return found


def _check_target(target: Path, overwrite: bool) -> None:
    check_writable(target.parent, "OUT in")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name a file")
    taken = [path for path in (target, onnx_file.data_file(target)) if path.exists()]
    if taken and not overwrite:
        raise ConfigError(f"{taken[0]} exists already; choose another name, or give --overwrite")


def _tell_needs(target: Path, segmentor: torch.nn.Module, file_format: ModuleType) -> None:
    """Says what disk and host memory it will take, with a warning where less memory is free now. Raises OutputError
    where the disk has no room for the weights."""
    place = next(parent for parent in target.absolute().parents if parent.exists())
    tensors = (*segmentor.named_parameters(), *segmentor.named_buffers())
    needed = 4 * sum(tensor.numel() for name, tensor in tensors if not name.startswith("auxiliary_head"))
    if needed > (free := shutil.disk_usage(place).free):
        raise OutputError(
            f"{target} needs {needed / 2**20:.1f} MiB but only {free / 2**20:.1f} MiB are free in {place}; make room "
            "there, or choose another folder"
        )
    memory = PROCESS + file_format.memory_factor(needed) * needed
    spare = free_memory(torch.device("cpu"), processes=1)
    log.log(
        logging.INFO if memory <= spare else logging.WARNING,
        "the file will take %s of disk, and writing it about %s of host memory beside what a forward pass takes%s",
        _size(needed),
        _size(memory),
        "" if memory <= spare else f"; {_size(spare)} are free now",
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _in_fp32(experiment: Experiment) -> Experiment:
    """The experiment with a segmentor that computes in fp32 everywhere."""
    cfg = Config(experiment.cfg.to_dict())
    cfg.merge_from_dict({"engine.backbone_dtype": "float32", "engine.heads_dtype": "float32"})
    return read_experiment(cfg)


def _input(experiment: Experiment, patch: int, size: Sequence[int] | None, dynamic: Dynamic) -> Input:
    if size is None:
        test_cfg = experiment.model.test_cfg
        if test_cfg.mode != "slide":
            raise ConfigError(
                f"model.test_cfg of {experiment.path} takes images whole, of any size; say for which the file is: "
                "--size HEIGHT WIDTH (with --dynamic size one of many)"
            )
        size = test_cfg.crop_size
    height, width = (int(side) for side in size)
    return Input((height, width), dynamic, COARSEST if patch == 1 else patch)


def _graph_of(segmentor: torch.nn.Module, experiment: Experiment) -> SegmentorGraph:
    mean, std, bgr = normalization(experiment)
    return SegmentorGraph(segmentor, mean, std, bgr=bgr).eval()


def _prepared(
    segmentor: torch.nn.Module, experiment: Experiment, given: Input, file_format: ModuleType
) -> object:
    """The program of a segmentor on the meta device, translated. Raises ConfigError where that cannot be."""
    with without_values(segmentor):
        buffers_to_fp32(segmentor)  # parameters are; casts that change nothing would be captured too
        try:
            return file_format.translated(captured(_graph_of(segmentor, experiment), given), given)
        except Exception as error:  # torch raises errors of all kinds
            raise ConfigError(_refusal(segmentor, given, error)) from error


def _refusal(segmentor: torch.nn.Module, given: Input, error: Exception) -> str:
    parts = [type(segmentor), type(segmentor.get_submodule("backbone"))]
    name = " on ".join(kind.__name__ for kind in parts)
    origin: BaseException = error
    while origin.__cause__ is not None:  # torch wraps the name of an operator that it cannot translate
        origin = origin.__cause__
    reason = reason_of(origin)[:LONGEST_REASON]
    if given.dynamic == "size":
        return (
            f"this {name} cannot be exported for images of any size: {reason}; write --dynamic batch, or one file for "
            "each size"
        )
    also = "; leave out --dynamic batch" if given.dynamic == "batch" else ""
    return f"this {name} cannot be exported: {reason}{also}"


def _with_values(experiment: Experiment, weights: Weights) -> SegmentorGraph:
    return _graph_of(with_weights(experiment, weights, torch.device("cpu")), experiment)


def _check(file_format: ModuleType, partial: Path, graph: SegmentorGraph, given: Input, target: Path) -> None:
    """Raises OutputError where the file computes something else than the graph."""
    difference = largest_difference(file_format.opened(partial), graph, given, graph.mean.size(1))
    if not difference <= TOLERANCE:
        raise OutputError(
            f"{target} is not left there: its logits differ from those of the segmentor by {difference:.1e} of the "
            f"largest, more than {TOLERANCE:g}; please report it, with config and versions of torch and onnxruntime"
        )
    log.info(
        "checked: on random images its logits differ from the segmentor's by %.1e of the largest", difference
    )


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A file of the same name in a folder beside the target, on its disk, which is removed at the end. Raises
    OutputError where the disk is full."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".partial", dir=target.parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder) / target.name
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror or error}; make room there, or choose another folder"
        ) from error
