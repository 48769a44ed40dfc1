"""Writes weight files piece by piece: what is in memory is one piece of some megabytes, however large the
tensors and the file.

In: names with an `Entry` each, which says shape, dtype and where the values come from. Out: a .pth that
torch.load reads, or a .safetensors, and its XXH3 checksums, which cost a tenth of the copy where SHA-256
costs more than all of it. The libraries' own writers want every tensor in memory first; the .pth is laid out
by torch.save all the same (`skip_data` leaves room for the values), and the safetensors header follows the
format's specification.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from internseg_ds.checkpoints.checksum_files import FileSummer, FileSums
from internseg_ds.checkpoints.stored_tensors import SAFETENSORS_DTYPES, load_stored

PIECE = 2**20
"""Elements that are read, cast and written at a time."""
NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
Advance = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. read_slice(start, stop): its values laid out flat, in any dtype; they are cast
    to `dtype`."""

    shape: torch.Size
    dtype: torch.dtype
    read_slice: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def split(self, parts: int) -> list["Entry"]:
        """The tensor in equal parts along its first dimension."""
        shape = torch.Size([self.shape[0] // parts, *self.shape[1:]]) if parts > 1 else self.shape
        return [
            Entry(shape, self.dtype, partial(self._read_from, index * shape.numel()))
            for index in range(parts)
        ]

    @classmethod
    def joined(cls, parts: Sequence["Entry"]) -> "Entry":
        """Equal tensors as one, along their first dimension."""
        first = parts[0]
        numel = first.shape.numel()

        def read_slice(start: int, stop: int) -> Tensor:
            return torch.cat(
                [
                    part.read_slice(max(start - index * numel, 0), min(stop - index * numel, numel))
                    for index, part in enumerate(parts)
                    if start < (index + 1) * numel and stop > index * numel
                ]
            )

        return cls(torch.Size([len(parts) * first.shape[0], *first.shape[1:]]), first.dtype, read_slice)

    def _read_from(self, first: int, start: int, stop: int) -> Tensor:
        return self.read_slice(first + start, first + stop)

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of the tensor, in order."""
        numel = self.shape.numel()
        for start in range(0, numel, PIECE):
            piece = self.read_slice(start, min(start + PIECE, numel)).to(self.dtype)
            yield piece.contiguous().view(torch.uint8).numpy().data


def write_pth(
    path: Path, entries: Mapping[str, Entry], meta: Mapping[str, Any] | None, advance: Advance
) -> FileSums:
    """{"meta": meta, "state_dict": entries} as torch.save writes it, or the bare entries without a meta;
    returns the file's checksums.

    The archive's own CRC-32 fields stay empty, which torch.load does not look at (`unzip -t` would complain).
    """
    # addresses only: memory counts once it is written to
    hollow = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    with torch.serialization.skip_data():
        torch.save(hollow if meta is None else {"meta": dict(meta), "state_dict": hollow}, path)
    del hollow
    content = load_stored(path)
    places = {
        name: stored.place for name, stored in (content if meta is None else content["state_dict"]).items()
    }
    digest = FileSummer()
    with path.open("r+b") as file:
        for name in sorted((name for name, entry in entries.items() if entry.nbytes), key=places.__getitem__):
            digest.update(file.read(places[name] - file.tell()))  # the archive's headers, which torch wrote
            file.seek(places[name])
            _write(file, entries[name], digest, advance)
        digest.update(file.read())
    return digest.sums()


def write_safetensors(
    path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str], advance: Advance
) -> FileSums:
    """A .safetensors file with `entries` in their order; returns its checksums. metadata: strings, "format":
    "pt" among them."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in entries.items():
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end := end + entry.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    digest = FileSummer()
    with path.open("wb") as file:
        for data in (len(text).to_bytes(8, "little"), text):
            file.write(data)
            digest.update(data)
        for entry in entries.values():
            _write(file, entry, digest, advance)
    return digest.sums()


def _write(file: BinaryIO, entry: Entry, digest: FileSummer, advance: Advance) -> None:
    for data in _ahead(entry.pieces(), digest):
        file.write(data)
        advance(len(data))


def _ahead(pieces: Iterator[memoryview], digest: FileSummer) -> Iterator[memoryview]:
    """The same pieces; a thread reads the next one, and adds it to the checksums, while this one is
    written."""

    def following() -> memoryview | None:
        piece = next(pieces, None)
        if piece is not None:
            digest.update(piece)
        return piece

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while (piece := coming.result()) is not None:
            coming = thread.submit(following)
            yield piece
