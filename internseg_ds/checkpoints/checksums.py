"""Checksums of files, block by block: made while a file is written, and held against it while it is read.

In: what a writer writes (`SummedFile`), or what is known of a file (`of_digests`, `of_zip`). Out: digests, or
a `CheckedFile`, through which every read goes. A block is checked when its first byte is asked for: what
nobody reads costs nothing, little is read twice, and each rank checks what it reads itself. Blocks are
mebibytes under 128-bit XXH3, which is several times as fast as a copy; in archives of torch.save that come
without such checksums they are the archive's own entries under CRC-32.
"""

import io
import os
import struct
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

import xxhash

from internseg_ds.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 2**20
"""Bytes under one checksum: few enough to stay in a core's cache between two uses, and enough to outweigh a
digest."""
DIGEST = 32
"""Characters of a digest."""
ZIP = b"PK\x03\x04"
"""What a file of torch 1.6 or later, a zip archive, starts with, and each of its entries."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""What stands before an entry of a zip archive: a mark, and the lengths of the name and of the padding that
follow."""


class _Sum(Protocol):
    def update(self, data: memoryview) -> None: ...

    def hexdigest(self) -> str: ...


class BlockSums:
    """The digests of bytes that come by in order."""

    def __init__(self) -> None:
        self.size = 0
        self._digests: list[str] = []
        self._open = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        for piece in self.cut(data):
            self.add(piece)

    def cut(self, data: memoryview) -> Iterator[memoryview]:
        """`data` in pieces that end where blocks do, for `add`."""
        at, room = 0, BLOCK - self.size % BLOCK
        while at < len(data):
            yield data[at : at + room]
            at, room = at + room, BLOCK

    def add(self, piece: memoryview) -> None:
        """A piece that `cut` gave."""
        self._open.update(piece)
        self.size += len(piece)
        if self.size % BLOCK == 0:
            self._digests.append(self._open.hexdigest())
            self._open.reset()

    def hexdigests(self) -> str:
        """Of all blocks, end to end, the last one of what has come by of it."""
        return "".join(self._digests) + (self._open.hexdigest() if self.size % BLOCK else "")


@dataclass(frozen=True)
class Written:
    """What was written into a file. digests: `BlockSums.hexdigests`."""

    size: int
    digests: str


class SummedFile:
    """A file that is written from its start to its end, as torch.save does, and its checksums: of what is in
    memory, and not of what has come to the disk.

    `write` does not raise, since torch calls it from code that is not to be left so: the first failure is
    noted in `failure`, and what follows is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.failure: OSError | None = None
        self._sums = BlockSums()
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            for piece in self._sums.cut(view) if self.failure is None else ():
                self._sums.add(piece)  # before it is written: the copy then finds it in the cache
                while piece:
                    piece = piece[self._file.write(piece) :]
        except OSError as error:
            self.failure = error
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def to_disk(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> Written:
        self._file.close()
        return Written(self._sums.size, self._sums.hexdigests())


@dataclass(frozen=True)
class _Block:
    start: int
    stop: int
    digest: str


@dataclass
class CheckedFile:
    """A file whose blocks are known. blocks: in order; bytes between them are not checked. sums: makes an
    empty checksum of their kind. source: what names the checksums in the message."""

    path: Path
    blocks: list[_Block]
    sums: Callable[[], _Sum]
    source: str
    _starts: list[int] = field(init=False, repr=False)
    _seen: bytearray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._starts = [block.start for block in self.blocks]
        self._seen = bytearray(len(self.blocks))

    def read_into(self, file: io.FileIO, room: memoryview, start: int) -> int:
        """Reads the bytes from `start` on into `room`, and checks the blocks that they lie in; how many there
        were. file: opened without a buffer.

        Raises DamagedError where a block is not what it was.
        """
        stop = start + _read(file, room, start)
        for index in self._overlapping(start, stop):
            if not self._seen[index]:
                block, found = self.blocks[index], self.sums()
                _add(file, found, block.start, min(start, block.stop))
                found.update(room[max(block.start - start, 0) : min(block.stop, stop) - start])
                _add(file, found, stop, block.stop)
                self._compare(index, found)
        return stop - start

    def check(self) -> None:
        """Reads and checks all blocks. Raises DamagedError where one is not what it was."""
        with self.path.open("rb", buffering=0) as file:
            for index, seen in enumerate(self._seen):
                if not seen:
                    found = self.sums()
                    _add(file, found, self.blocks[index].start, self.blocks[index].stop)
                    self._compare(index, found)

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file to read from, checked. Raises DamagedError, at the end of the `with` block, where a read
        met damage: not every library lets an exception of a read through."""
        with self.path.open("rb", buffering=0) as file:
            reader = _Reader(self, file)
            try:
                yield cast(BinaryIO, reader)  # it has all that readers ask a BinaryIO for
            except Exception:
                if reader.damage is None:
                    raise
            if reader.damage is not None:
                raise reader.damage

    def _overlapping(self, start: int, stop: int) -> range:
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self.blocks[first].stop <= start:
            first += 1
        return range(first, bisect_left(self._starts, stop))

    def _compare(self, index: int, found: _Sum) -> None:
        block = self.blocks[index]
        if found.hexdigest() != block.digest:
            raise DamagedError(
                f"{self.path} is not what was written: the checksum of its bytes {block.start:,} to "
                f"{block.stop:,} is {found.hexdigest()}, {self.source} has {block.digest}; copy it again, "
                "or take another checkpoint"
            )
        self._seen[index] = True


class _Reader(io.RawIOBase):
    """A `CheckedFile` that is open."""

    def __init__(self, checked: CheckedFile, file: io.FileIO) -> None:
        self._checked = checked
        self._file = file
        self._at = 0
        self.damage: DamagedError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = offset + (self._file.seek(0, io.SEEK_END) if base is None else base)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "Buffer") -> int:
        try:
            count = self._checked.read_into(self._file, memoryview(buffer).cast("B"), self._at)
        except DamagedError as error:
            self.damage = error
            raise
        self._at += count
        return count


def _read(file: io.FileIO, room: memoryview, start: int) -> int:
    """Fills `room` from byte `start` on; how much there was."""
    file.seek(start)
    count = 0
    while count < len(room) and (got := file.readinto(room[count:])):
        count += got
    return count


def _add(file: io.FileIO, sums: _Sum, start: int, stop: int) -> None:
    """Adds the bytes [start, stop) of a file to `sums`; none where stop is not above start."""
    room = memoryview(bytearray(max(0, min(BLOCK, stop - start))))
    for at in range(start, stop, BLOCK):
        piece = room[: stop - at]
        sums.update(piece[: _read(file, piece, at)])


def of_digests(path: Path, size: int, digests: str, source: str, block: int = BLOCK) -> CheckedFile:
    """A file of `size` bytes of which every `block` have a digest."""
    blocks = [
        _Block(start, min(start + block, size), digests[DIGEST * number : DIGEST * (number + 1)])
        for number, start in enumerate(range(0, size, block))
    ]
    return CheckedFile(path, blocks, xxhash.xxh3_128, source)


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def of_zip(path: Path) -> CheckedFile | None:
    """An archive of torch.save, of which only its own CRC-32 are known. None for another file, as of torch
    before 1.6.

    Entries without one (torch.serialization.set_crc32_options(False)) are not checked. Raises CheckpointError
    where the archive is damaged.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:
                return None
            blocks = []
            for entry in sorted(zipfile.ZipFile(file).infolist(), key=lambda entry: entry.header_offset):
                file.seek(entry.header_offset)
                mark, name, padding = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
                if mark != ZIP or not stored:
                    raise zipfile.BadZipFile(
                        f"its entry {entry.filename} is not where, or not what, it should be"
                    )
                start = entry.header_offset + LOCAL_HEADER.size + name + padding
                if entry.CRC and entry.file_size:
                    blocks.append(_Block(start, start + entry.file_size, f"{entry.CRC:08x}"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is incomplete; copy it again, with all its files"
        ) from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(
            f"{path} is truncated or no PyTorch file ({error}); copy it again, or take another checkpoint"
        ) from None
    return CheckedFile(path, blocks, _Crc32, "its own archive")
