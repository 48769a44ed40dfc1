"""TorchScript: a program traced by `torch.jit.trace` for one size, and its file, which libtorch loads in C++.

torch calls it deprecated; it is written as long as torch does.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from internseg_ds.errors import ConfigError
from internseg_ds.evaluation.deployment.graph import Input


def check(given: Input) -> None:
    """Raises ConfigError for sizes that may differ: a trace has one."""
    if given.dynamic != "none":
        raise ConfigError(
            f"--dynamic {given.dynamic}: TorchScript is traced for images of one size and number; write an .onnx, or "
            "leave it out"
        )


def translated(program: ExportedProgram, given: Input) -> Any:
    """The program as a module, with an example of its input."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return program.module(), tuple(node.meta["val"].shape)


def write(made: Any, values: Mapping[str, Tensor], description: Mapping[str, str], path: Path) -> list[Path]:
    """Traces what `translated` made with these values, and writes it to `path`; returns its files. The description
    lies in the archive, one text file for each entry. Raises OSError where it cannot be written."""
    module, shape = made
    for names in (module.named_parameters, module.named_buffers):
        for name, _ in list(names()):
            owner, _, own = name.rpartition(".")
            if name in values:
                setattr(module.get_submodule(owner), own, values[name])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, torch.zeros(shape), check_trace=False)
        with path.open("wb") as file:  # given a path, torch aborts the process where the disk is full
            torch.jit.save(
                traced, file, _extra_files={name: text.encode() for name, text in description.items()}
            )
    return [path]


def memory_factor(size: int) -> float:
    """As of `onnx_file.memory_factor`, whatever the size."""
    return 4.5  # measured once: 4.3 (docs/using_models.md)


def opened(path: Path) -> Callable[[Tensor], Tensor]:
    """The file in libtorch, on the CPU: images -> logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu")
