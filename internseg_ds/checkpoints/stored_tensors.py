"""Tensors where they lie in a file: dtype, shape and place, read by plain file reads when somebody asks for
their elements.

In: PyTorch's zip files (.pth, .pt, .bin) and safetensors. Out: their content with a `StoredTensor` for each
tensor. Opening a file of any size costs no memory, and reading a slice costs that slice: memory-mapped pages
(`torch.load(mmap=True)`) would count as resident memory of the process for as long as the file is open.
Pickles may hold tensors, numbers, strings and containers; anything that would run code is refused.
"""

import codecs
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from internseg_ds.checkpoints.checksums import ZIP, CheckedFile
from internseg_ds.checkpoints.json_files import LARGEST, object_in
from internseg_ds.errors import CheckpointError, DamagedError
from internseg_ds.moment_formats import BLOCK, ByteCode, from_bytes, scales_of
from internseg_ds.torch_internals import fake_tensor_mode, position_in_file


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. place: byte at which its first element lies. stride: in elements, None when the
    elements lie in order (as nearly all do). checked: what the file should hold, where that is known; reads
    are held against it."""

    path: Path
    place: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None = None
    checked: CheckedFile | None = field(default=None, compare=False, repr=False)

    def numel(self) -> int:
        return self.shape.numel()

    def read(self) -> Tensor:
        """The whole tensor, fresh, in the file's dtype."""
        if self.stride is None:
            return self.read_slice(0, self.numel()).view(self.shape)
        reach = (
            1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) if self.numel() else 0
        )
        reached = StoredTensor(
            self.path, self.place, self.dtype, torch.Size([reach]), checked=self.checked
        ).read()
        return reached.as_strided(self.shape, self.stride).contiguous()

    def read_slice(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the tensor laid out flat: (stop - start,), fresh. Raises CheckpointError
        when the file ends before them, or is not what was written."""
        if self.stride is not None:
            return self.read().flatten()[start:stop].clone()
        out = torch.empty(stop - start, dtype=self.dtype)
        self._read_into(out, start)
        return out

    def read_slice_into(self, out: Tensor, start: int) -> None:
        """The same, into `out` (flat, contiguous, of any floating dtype), from element `start` on."""
        if self.stride is None and out.dtype == self.dtype:
            self._read_into(out, start)
        else:
            out.copy_(self.read_slice(start, start + out.numel()))

    def _read_into(self, out: Tensor, start: int) -> None:
        begin = self.place + start * self.dtype.itemsize
        room = out.view(torch.uint8).numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                if self.checked is not None:
                    room = room[self.checked.read_into(file, room, begin) :]
                else:
                    file.seek(begin)
                while room:
                    if not (count := file.readinto(room)):
                        raise DamagedError(
                            f"{self.path} ends before its tensors do: it is truncated; copy it again"
                        )
                    room = room[count:]
        except OSError as error:
            raise DamagedError(
                f"{self.path} cannot be read: {error.strerror or error}; copy it again, or take another "
                "checkpoint"
            ) from None


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory with the interface of a stored one."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def numel(self) -> int:
        return self.tensor.numel()

    def read(self) -> Tensor:
        return self.tensor.clone()

    def read_slice(self, start: int, stop: int) -> Tensor:
        return self.tensor.flatten()[start:stop].clone()

    def read_slice_into(self, out: Tensor, start: int) -> None:
        out.copy_(self.tensor.flatten()[start : start + out.numel()])


Stored = StoredTensor | HeldTensor


@dataclass(frozen=True)
class StoredBytes:
    """A moment of an optimizer in 8 bits (`moment_formats`). codes: (n,) uint8. scales: fp32, of its
    blocks."""

    codes: Stored
    scales: Stored
    code: ByteCode

    def numel(self) -> int:
        return self.codes.numel()

    def read_slice_into(self, out: Tensor, start: int) -> None:
        """Elements from `start` on, into `out` (flat, of any floating dtype). Raises CheckpointError."""
        first, stop = start // BLOCK, start + out.numel()
        codes = self.codes.read_slice(first * BLOCK, stop)
        scales = self.scales.read_slice(first, scales_of(stop))
        out.copy_(from_bytes(codes, scales, self.code)[start - first * BLOCK :])


class _StandIn:
    """Takes the place of DeepSpeed's own small classes in its files: holds what the pickle gives it and does
    nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _stand_in_enum(value: Any) -> Any:
    """DeepSpeed's enums become their plain values."""
    return value


ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}
"""Members of DeepSpeed's ZeroStageEnum (runtime/zero/config.py)."""


def _member(owner: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 (Debian 12's) write for a member of an enum, in the place of getattr: anything but
    the member of the one enum is refused."""
    if owner is not _stand_in_enum or name not in ZERO_STAGES:
        raise pickle.UnpicklingError("Unsupported function getattr")
    return ZERO_STAGES[name]


def _maker(value: np.generic | np.ndarray) -> Callable:
    """The function that a pickle of such a value calls to make it again."""
    reduced = value.__reduce__()
    assert not isinstance(reduced, str)
    return reduced[0]


ALLOWED: list[Callable | tuple[Callable, str]] = [
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_StandIn, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_stand_in_enum, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member, "builtins.getattr"),
    (_StandIn, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_StandIn, "argparse.Namespace"),  # `args` of timm's training checkpoints
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"),
    # numpy 1 and numpy 2
    (_maker(np.float64()), "numpy.core.multiarray.scalar"),
    (_maker(np.float64()), "numpy._core.multiarray.scalar"),
    (_maker(np.empty(0)), "numpy.core.multiarray._reconstruct"),
    (_maker(np.empty(0)), "numpy._core.multiarray._reconstruct"),
    (codecs.encode, "_codecs.encode"),
]
"""What a file may hold beside tensors, numbers, strings and containers: DeepSpeed's own small classes, the
settings that timm's training keeps, and numpy's numbers and arrays, which mmcv's `meta` has (best score,
PALETTE). Anything else is refused."""
PICKLE = "data.pkl"
"""The end of the name that torch gives the pickle inside its archives."""
LARGEST_PICKLE = 4 * LARGEST
"""Bytes. A tensor takes some 120 of them. Four times what a safetensors header may have, since a pickle also
holds an optimizer's state, and numpy arrays with their values."""


def load_stored(path: Path, checked: CheckedFile | None = None) -> Any:
    """The content of a file of torch.save, with a `StoredTensor` for each tensor. Files of torch before 1.6,
    which are no zip archives, are read whole. checked: what the file should hold; whatever is read, now and
    from the tensors later, is held against it.

    Raises CheckpointError when it is missing, damaged, too large or not such a file, or holds other objects,
    or sparse or quantized tensors.
    """
    try:
        content = _unpickled(path, checked)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(_reason_not_loaded(path, error)) from None
    try:
        return _stored(content, path, checked)
    except RecursionError:
        raise CheckpointError(
            f"{path} holds lists or dicts inside each other, deeper than any checkpoint's; take another file"
        ) from None


def _unpickled(path: Path, checked: CheckedFile | None) -> Any:
    """What torch.load makes of a file: tensors on the meta device that note where they lie; those of a file
    of torch before 1.6 with their values."""
    with path.open("rb") as file:
        zipped = file.read(len(ZIP)) == ZIP
    if zipped:
        with path.open("rb") if checked is None else checked.opened() as archive:
            _check_size_of_pickle(path, archive)
    with (
        torch.serialization.safe_globals(ALLOWED),
        _noting_places() if zipped else nullcontext(),
        nullcontext(path) if checked is None else checked.opened() as source,
    ):
        return torch.load(source, map_location="meta" if zipped else "cpu", weights_only=True)


def _check_size_of_pickle(path: Path, archive: BinaryIO) -> None:
    """Raises CheckpointError where the pickle inside an archive is larger than any checkpoint's. Its size is
    in the archive's directory, so that nothing is unpickled before."""
    entries = zipfile.ZipFile(archive).infolist()
    size = max((entry.file_size for entry in entries if entry.filename.endswith(PICKLE)), default=0)
    if size > LARGEST_PICKLE:
        raise CheckpointError(
            f"the pickle in {path} has {size / 2**20:.0f} MiB, and no model's has more than "
            f"{LARGEST_PICKLE / 2**20:.0f}: it would name more than 500,000 tensors; take another file"
        )


def _reason_not_loaded(path: Path, error: Exception) -> str:
    """The error message for what torch.load raised."""
    if isinstance(error, FileNotFoundError):
        return f"{path} is missing: the checkpoint is incomplete; copy it again with all its files"
    if isinstance(error, NotImplementedError):
        return f"{path} holds quantized or other special tensors; save plain ones"
    if not isinstance(error, pickle.UnpicklingError):
        reason = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0][:120]
        return f"{path} is truncated or no PyTorch file ({reason}); copy it again, or take another checkpoint"
    # what torch says of a class or function that it would have to import
    if "unsupported" not in str(error).lower():
        return f"{path} is damaged or no PyTorch file; copy it again, or take another checkpoint"
    kind = re.search(r"(?:GLOBAL|class|function) (\w[\w.]+)", str(error))
    return (
        f"{path} holds {kind[1] if kind else 'objects'} beside tensors, numbers and strings, and loading it "
        "would run code; save the model's state_dict() alone"
    )


def _noting_places() -> AbstractContextManager:
    """Inside, torch.load(map_location="meta") notes where each storage lies (`position_in_file`) instead of
    reading it."""
    if torch.__version__ >= "2.13":  # does so of itself; versions are compared, not strings
        return nullcontext()
    return fake_tensor_mode()


def _stored(value: Any, path: Path, checked: CheckedFile | None) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise CheckpointError(f"{path} holds sparse tensors; save plain ones")
        start = position_in_file(value)
        if start is None:
            return HeldTensor(value)
        return StoredTensor(
            path,
            start + int(value.storage_offset()) * value.itemsize,
            value.dtype,
            value.shape,
            None if value.is_contiguous() else value.stride(),
            checked,
        )
    if isinstance(value, Mapping):
        return {key: _stored(item, path, checked) for key, item in value.items()}
    if isinstance(value, list) or type(value) is tuple:  # torch.Size stays what it is
        return type(value)(_stored(item, path, checked) for item in value)
    return value


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_stored_safetensors(
    path: Path, checked: CheckedFile | None = None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Names and tensors of a safetensors file, and its metadata. checked: as for `load_stored`. Raises
    CheckpointError when it is damaged, or its header too large."""
    header, begin = _safetensors_header(path, checked)
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, which no weight of ours has; known are "
                f"{', '.join(SAFETENSORS_DTYPES)}"
            )
        first, last = entry["data_offsets"]
        assert math.prod(entry["shape"]) * dtype.itemsize == last - first
        tensors[name] = StoredTensor(path, begin + first, dtype, torch.Size(entry["shape"]), checked=checked)
    return tensors, metadata


def _safetensors_header(path: Path, checked: CheckedFile | None) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the byte at which the values begin."""
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") if checked is None else checked.opened() as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, LARGEST + 1))
        if length > LARGEST and len(text) > LARGEST:
            raise CheckpointError(
                f"the header of {path} has {length / 2**20:.0f} MiB, and no model's has more than "
                f"{LARGEST / 2**20:.0f}: it would name more than 100,000 tensors; take another file"
            )
        with safe_open(path, framework="pt"):  # checks the header, and the file's length against it
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({str(error)[:200]}); copy it again"
        ) from None
    return object_in(text, f"the header of {path}"), 8 + length
