"""One interface over every kind of weight file: .pth, .safetensors, folders of either as transformers writes
them, and ZeRO checkpoint directories.

Out: names, shapes, and tensors or slices of them, read from where they lie in the files. Nothing is renamed
(beyond wrappers' prefixes), cast or resized here.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internseg_ds.checkpoints.checksum_files import checked_beside
from internseg_ds.checkpoints.checksums import CheckedFile
from internseg_ds.checkpoints.json_files import object_in, read_object
from internseg_ds.checkpoints.merged_checkpoint import MergedCheckpoint, merged
from internseg_ds.checkpoints.stored_tensors import HeldTensor, Stored, load_stored, load_stored_safetensors
from internseg_ds.checkpoints.zero_checkpoint import What, ZeroCheckpoint
from internseg_ds.checkpoints.zero_files import is_zero_checkpoint
from internseg_ds.errors import CheckpointError, shortened
from internseg_ds.tensor_part import Part

log = logging.getLogger(__name__)

AVERAGED = ("state_dict_ema", "model_ema")
"""Averages of the weights, which timm takes before the weights themselves where a file has both."""
WRAPPERS = (*AVERAGED, "state_dict", "module", "model")
INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
LONGEST_NAME = 255
"""Characters of a shard's name, as file systems have it."""
Checked = Mapping[str, CheckedFile]
"""Of files that have checksums, by name."""


@dataclass(frozen=True)
class Weights:
    """shapes: name -> torch.Size. read(name): the tensor, fresh, in the dtype of the file. read_slice(name,
    start, stop): elements of it laid out flat. meta: CLASSES, PALETTE, ... where the file has them. config: a
    Hugging Face folder's config.json."""

    path: Path
    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    read_slice: Callable[[str, int, int], Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def open_weights(path: Path, *, ema: bool = False, check: bool = True) -> Weights:
    """Opens a weight file, or a folder of them, or a ZeRO checkpoint (WORK_DIR, its checkpoints folder, or
    one save), whatever it is. Low-rank adapters of a ZeRO checkpoint are merged into the weights.

    ema: of a ZeRO checkpoint, the averaged weights. check: what is read is held against the checksums that
    were noted when it was written: of a save in its manifest, of other weights in the NAME.xxh128 beside
    them, where there is one. Nothing is held open: each read opens its file. Raises CheckpointError when it
    is missing, damaged, or no weight file.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no weight file {path}")
    if is_zero_checkpoint(path):
        return weights_of(merged(ZeroCheckpoint.open(path, check=check)), "ema" if ema else "fp32")
    if ema:
        raise CheckpointError(
            f"{path} is no ZeRO checkpoint, which alone keeps averaged weights beside the others"
        )
    checked = checked_beside(path) if check else {}
    if path.is_dir():
        return _folder(path, checked)
    if path.suffix == ".safetensors":
        return _safetensors(path, [path], checked)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _pth(path, checked)
    raise CheckpointError(
        f"{path} has an unknown ending; weights are .pth, .safetensors, a folder of safetensors or of "
        "pytorch_model.bin, or a ZeRO "
        "checkpoint directory"
    )


def weights_of(checkpoint: ZeroCheckpoint | MergedCheckpoint, what: What = "fp32") -> Weights:
    """The weights (or their average, what="ema") of a ZeRO checkpoint that is open already, and its buffers.
    Raises CheckpointError where it has no average."""
    checkpoint.check_holds(what)
    buffers = {name: HeldTensor(value) for name, value in checkpoint.buffers.items()}
    shapes = checkpoint.shapes | {name: buffer.shape for name, buffer in buffers.items()}

    def read_slice(name: str, start: int, stop: int) -> Tensor:
        return (
            buffers[name].read_slice(start, stop)
            if name in buffers
            else checkpoint.read_slice(name, start, stop, what)
        )

    return Weights(
        checkpoint.path,
        shapes,
        lambda name: read_slice(name, 0, shapes[name].numel()).view(shapes[name]),
        read_slice,
        checkpoint.manifest.get("meta", {}),
    )


def _of(file: Path, checked: Checked) -> CheckedFile | None:
    """What a file should hold. Raises CheckpointError where others have checksums and it has none."""
    if checked and file.name not in checked:
        raise CheckpointError(
            f"{file} has no checksum where the files beside it have; copy the weights again, with their "
            ".xxh128, or remove that"
        )
    return checked.get(file.name)


def _object(file: Path, checked: Checked) -> dict[str, Any]:
    """The object in a JSON file beside weights, which somebody may have added to them."""
    if file.name in checked:
        checked[file.name].check()
    return read_object(file)


def _of_tensors(path: Path, tensors: Mapping[str, Stored], meta: dict[str, Any]) -> Weights:
    return Weights(
        path,
        {name: value.shape for name, value in tensors.items()},
        lambda name: tensors[name].read(),
        lambda name, start, stop: tensors[name].read_slice(start, stop),
        meta,
    )


def _pth(path: Path, checked: Checked) -> Weights:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs") or head.lstrip().lower().startswith(
        (b"<!doctype", b"<html")
    ):
        kind = "a git-lfs pointer" if head.startswith(b"version") else "a web page"
        raise CheckpointError(f"{path} is {kind}, not the weights themselves; download the file again")
    content = load_stored(path, _of(path, checked))
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    meta = {
        key: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        for key, value in meta.items()
    }
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict) and content[wrapper]:
            if wrapper in AVERAGED:
                others = [name for name in WRAPPERS if name != wrapper and content.get(name)]
                log.info(
                    "%s: taken is %r, an average of the weights%s",
                    path,
                    wrapper,
                    f", and not {', '.join(map(repr, others))}, as timm does" if others else "",
                )
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of named weights")
    tensors = {
        name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in content.items()
        if isinstance(value, Stored)
    }
    if not tensors:
        raise CheckpointError(
            f"{path} holds no weights, "
            f"{'only ' + ', '.join(map(str, list(content)[:5])) if content else 'it is empty'}"
        )
    return _of_tensors(path, tensors, meta)


def recording_invalid(weights: Weights, parameters: Collection[str], noted: dict[str, str]) -> Weights:
    """A view of `weights` that notes the names of which a read met values that no model has, and what they
    are.

    In a parameter these are NaN, infinite (in fp32), or no real numbers; in a buffer NaN. parameters: names
    in the file of what becomes a parameter.
    """

    def look(name: str, value: Tensor) -> Tensor:
        if name not in parameters:
            if value.isnan().any():
                noted[name] = "NaN"
        elif not value.is_floating_point():
            noted[name] = str(value.dtype).removeprefix("torch.")
        elif not value.to(torch.float32).isfinite().all():
            noted[name] = "NaN or infinite"
        return value

    return dataclasses.replace(
        weights,
        read=lambda name: look(name, weights.read(name)),
        read_slice=lambda name, start, stop: look(name, weights.read_slice(name, start, stop)),
    )


def refuse_invalid(weights: Weights, noted: Mapping[str, str]) -> None:
    """Raises CheckpointError when `recording_invalid` has noted any."""
    if noted:
        names = [f"{name} ({values})" for name, values in sorted(noted.items())]
        raise CheckpointError(
            f"{weights.path} holds values that no weights have: {shortened(names)}; take another file"
        )


def renamed(
    weights: Weights, sources: Mapping[str, tuple[str | Part, ...]], rest: Collection[str] = ()
) -> Weights:
    """A view of `weights` with other names: new name -> old names, or parts of their tensors, several of which
    are joined along the first dimension. rest: old names that stay."""
    taken = {
        name: [part if isinstance(part, Part) else Part(part, 0, 1) for part in parts]
        for name, parts in {**sources, **{name: (name,) for name in rest}}.items()
    }

    def shape_of(part: Part) -> torch.Size:
        shape = weights.shapes[part.key]
        return torch.Size([shape[0] // part.parts, *shape[1:]]) if part.parts > 1 else shape

    shapes = {
        name: torch.Size([sum(shape_of(part)[0] for part in parts), *shape_of(parts[0])[1:]])
        if len(parts) > 1
        else shape_of(parts[0])
        for name, parts in taken.items()
    }

    def read_slice(name: str, start: int, stop: int) -> Tensor:
        found, begin = [], 0
        for part in taken[name]:
            numel = shape_of(part).numel()
            first, last = max(start - begin, 0), min(stop - begin, numel)
            if first < last:
                offset = part.index * numel
                found.append(weights.read_slice(part.key, offset + first, offset + last))
            begin += numel
        return torch.cat(found) if found else torch.empty(0)

    return dataclasses.replace(
        weights,
        shapes=shapes,
        read=lambda name: read_slice(name, 0, shapes[name].numel()).view(shapes[name]),
        read_slice=read_slice,
    )


def _folder(folder: Path, checked: Checked) -> Weights:
    """A folder as transformers writes it: safetensors, or PyTorch's files (pytorch_model.bin), each in one
    piece or in shards with an index."""
    if shards := _shards(folder, INDEX, "*.safetensors", checked):
        return _safetensors(folder, shards, checked)
    if not (shards := _shards(folder, PICKLED_INDEX, "pytorch_model*.bin", checked)):
        raise CheckpointError(
            f"{folder} holds no weights: no *.safetensors, no pytorch_model.bin, and no ZeRO checkpoint"
        )
    parts = [_pth(shard, checked) for shard in shards]
    where = {name: part for part in parts for name in part.shapes}
    return Weights(
        folder,
        {name: part.shapes[name] for name, part in where.items()},
        lambda name: where[name].read(name),
        lambda name, start, stop: where[name].read_slice(name, start, stop),
        config=_config(folder, checked),
    )


def _shards(folder: Path, index_name: str, pattern: str, checked: Checked) -> list[Path]:
    """The files that an index names, or those of a pattern."""
    index = folder / index_name
    if not index.is_file():
        return sorted(folder.glob(pattern))
    names = _object(index, checked).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of file names; copy it again")
    shards = []
    for name in sorted(set(names.values())):
        if (
            not 0 < len(name) <= LONGEST_NAME
            or not name.isprintable()
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise CheckpointError(
                f"{index} names {name[:80]!r}, which is no file in its folder; files outside of it are not "
                "read; take another copy of "
                "the model"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, but {index.name} names it; copy the folder again, with all "
                "its files"
            )
        shards.append(folder / name)
    return shards


def _safetensors(path: Path, shards: list[Path], checked: Checked) -> Weights:
    tensors: dict[str, Stored] = {}
    meta: dict[str, Any] = {}
    for shard in shards:
        found, metadata = load_stored_safetensors(shard, _of(shard, checked))
        tensors |= found
        meta |= object_in(metadata.get("meta", "{}"), f"the metadata 'meta' of {shard}")
    return dataclasses.replace(
        _of_tensors(path, tensors, meta), config=_config(path, checked) if path.is_dir() else None
    )


def _config(folder: Path, checked: Checked) -> dict[str, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = _object(file, checked)
    if not isinstance(config.get("vision_config") or {}, dict):
        raise CheckpointError(
            f"{file} is damaged: its vision_config is a {type(config['vision_config']).__name__}, and no "
            "object of names; copy it again"
        )
    return config
