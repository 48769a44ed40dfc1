"""ONNX: a program translated by `torch.onnx`, its file, and onnxruntime to run it.

onnx, onnxscript and onnxruntime are optional (the extra `onnx`) and imported in functions. The translation needs no
values: they are given to it when it is written, tensor by tensor.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from internseg_ds.errors import ConfigError
from internseg_ds.evaluation.deployment.graph import Input
from internseg_ds.torch_internals import is_fake

OPSET = 18
"""Of the operators; GridSample came with 16."""
LARGEST_FILE = 2**31 - 2**27
"""Bytes of weights in one file: protobuf, in which it is written, takes 2 GiB. Larger ones lie in NAME.onnx.data."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUT = "logits"
INPUT = "image"


def check(given: Input) -> None:
    """Any input can be translated. Raises ConfigError naming what to install."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"{name} cannot be imported ({error}), and ONNX files are written and checked with it; pip install "
                "internseg-ds[onnx]"
            ) from error


def translated(program: ExportedProgram, given: Input) -> Any:
    """torch's ONNXProgram, which may be without values. Raises what torch raises for operators that it has no
    translation of."""
    names = {0: "batch"} if given.dynamic != "none" else {}
    names |= {2: "height", 3: "width"} if given.dynamic == "size" else {}
    with _quiet():
        made: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            optimize=False,  # which folds constants, and so wants the values
            verbose=False,
        )
    for value in (*made.model.graph.inputs, *made.model.graph.outputs):
        for axis, name in names.items():
            value.shape[axis] = name
    return made


def write(made: Any, values: Mapping[str, Tensor], description: Mapping[str, str], path: Path) -> list[Path]:
    """Writes what `translated` made, with these values, to `path`; returns its files. path: NAME.onnx.

    Raises RuntimeError where a tensor of it has no values.
    """
    tensors = made.model.graph.initializers
    made.apply_weights({name: values[name] for name in tensors if name in values})
    if empty := [name for name, tensor in tensors.items() if _is_fake(tensor)]:
        raise RuntimeError(f"{empty} of the program have no values")
    with _quiet():
        made.optimize()
    _without_origins(made.model)
    made.model.producer_name = "internseg_ds"
    made.model.metadata_props.update(description)
    size = sum(tensor.const_value.nbytes for tensor in tensors.values())
    made.save(path, external_data=size > LARGEST_FILE)
    data = data_file(path)
    return [data, path] if data.exists() else [path]


def data_file(path: Path) -> Path:
    """Where the weights lie that the file itself cannot hold."""
    return path.with_name(path.name + ".data")


def memory_factor(size: int) -> float:
    """Host memory at the peak of writing and checking `size` bytes of weights, as so many times their size."""
    # measured (docs/using_models.md): 4.0 and 4.7 through protobuf, 2.1 beside the file
    return 5.0 if size <= LARGEST_FILE else 2.2


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in onnxruntime, on the CPU: images -> logits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: image.numpy()})[0])

    return run


def _without_origins(model: Any) -> None:
    """Takes out what torch notes of each node: the lines of Python that it came from, with paths of this machine, and
    as many bytes as a small model has."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.graph.subgraphs()):  # functions are inlined by now
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _is_fake(tensor: Any) -> bool:
    raw = getattr(tensor.const_value, "raw", None)
    return tensor.const_value is None or is_fake(raw)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of torch and onnxscript that a user can do nothing about."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
