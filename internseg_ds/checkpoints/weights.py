"""One interface over every kind of weight file: .pth, .safetensors (one, or a folder with an index), and ZeRO checkpoint directories.

Out: names, shapes, and tensors read one at a time from memory-mapped files. Nothing is renamed (beyond wrappers' prefixes), cast or resized here.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint, is_zero_checkpoint, load_mapped
from internseg_ds.errors import CheckpointError

WRAPPERS = ("state_dict", "module", "model")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """shapes: name -> torch.Size. read(name): the tensor, in the dtype of the file. meta: CLASSES, PALETTE, ... where the file has them."""

    path: Path
    shapes: dict[str, torch.Size]
    read: Callable[[str], Tensor]
    meta: dict[str, Any] = field(default_factory=dict)


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Opens a weight file, or a folder of safetensors, or a ZeRO checkpoint (WORK_DIR, its checkpoints folder, or one save), whatever it is.

    Raises CheckpointError when it is missing, damaged, or no weight file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no weight file {path}")
    with ExitStack() as files:
        if is_zero_checkpoint(path):
            yield _zero(path)
        elif path.is_dir():
            yield _safetensors(path, _shards(path), files)
        elif path.suffix == ".safetensors":
            yield _safetensors(path, [path], files)
        elif path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            yield _pth(path)
        else:
            raise CheckpointError(f"{path} has an unknown ending; weights are .pth, .safetensors, a folder of safetensors, or a ZeRO checkpoint directory")


def _zero(path: Path) -> Weights:
    checkpoint = ZeroCheckpoint.open(path)
    shapes = checkpoint.shapes | {name: buffer.shape for name, buffer in checkpoint.buffers.items()}
    return Weights(checkpoint.path, shapes, lambda name: checkpoint.buffers[name] if name in checkpoint.buffers else checkpoint.read(name),
                   checkpoint.manifest.get("meta", {}))


def _pth(path: Path) -> Weights:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs") or head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        kind = "a git-lfs pointer" if head.startswith(b"version") else "a web page"
        raise CheckpointError(f"{path} is {kind}, not the weights themselves; download the file again")
    content = load_mapped(path)
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    meta = {key: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value for key, value in meta.items()}
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of named weights")
    tensors = {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights, only {', '.join(map(str, list(content)[:5]))}")
    return Weights(path, {name: value.shape for name, value in tensors.items()}, tensors.__getitem__, meta)


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            shards = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({type(error).__name__}: {error}); copy it again") from None
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} holds neither safetensors nor a ZeRO checkpoint")
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, but {index.name} names it; copy the folder again, with all its files")
    return shards


def _safetensors(path: Path, shards: list[Path], files: ExitStack) -> Weights:
    from safetensors import SafetensorError, safe_open

    where: dict[str, Any] = {}
    shapes: dict[str, torch.Size] = {}
    meta: dict[str, Any] = {}
    for shard in shards:
        try:
            opened = files.enter_context(safe_open(shard, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is truncated or no safetensors file ({error}); copy it again") from None
        meta |= json.loads((opened.metadata() or {}).get("meta", "{}"))
        for name in opened.keys():  # noqa: SIM118 - not a dict
            where[name], shapes[name] = opened, torch.Size(opened.get_slice(name).get_shape())
    return Weights(path, shapes, lambda name: where[name].get_tensor(name), meta)
