"""The file of checksums beside a result of `consolidate`: `NAME.xxh128`, in the format of `xxh128sum -c`.

A line for each file, and below them, as comments, the checksums of each block of it, by which a process that
reads a part can check that part.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import xxhash

from internseg_ds.checkpoints.checksums import BLOCK, DIGEST, BlockSums, CheckedFile, of_digests
from internseg_ds.errors import CheckpointError, DamagedError
from internseg_ds.progress import BYTES, progress

LINE = re.compile(r"([0-9a-f]{32})  (.+)")
BLOCKS = re.compile(r"# (\d+) bytes, blocks of (\d+): ((?:[0-9a-f]{32})*)  (.+)")


@dataclass(frozen=True)
class FileSums:
    """whole: of all bytes. size, blocks: how many there are, and the digests of their blocks, where they are
    known."""

    whole: str
    size: int | None = None
    block: int = BLOCK
    blocks: str = ""


class FileSummer:
    """Makes the `FileSums` of bytes that come by in order."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._blocks = BlockSums()

    def update(self, data: bytes | memoryview) -> None:
        for piece in self._blocks.cut(memoryview(data)):
            self._whole.update(piece)
            self._blocks.add(piece)

    def sums(self) -> FileSums:
        return FileSums(self._whole.hexdigest(), self._blocks.size, BLOCK, self._blocks.hexdigests())


def sum_file(out: Path) -> Path:
    """Where the checksums of a file or folder are."""
    return out.with_name(out.name + ".xxh128")


def written_sums(sums: Mapping[str, FileSums]) -> str:
    """The content of a sum file. sums: by the name of a file, or FOLDER/NAME."""
    return "".join(f"{each.whole}  {name}\n" for name, each in sums.items()) + "".join(
        f"# {each.size} bytes, blocks of {each.block}: {each.blocks}  {name}\n" for name, each in sums.items()
    )


def read_sums(out: Path) -> dict[str, FileSums]:
    """What the sum file of `out` says, by name. Raises CheckpointError when it is missing or damaged."""
    note = sum_file(out)
    try:
        lines = note.read_text(errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"{note} cannot be read ({error.strerror or error}), so nothing says what {out} should hold"
        ) from None
    try:
        return _parsed_sums(lines)
    except ValueError:
        raise CheckpointError(
            f"{note} is damaged or empty, so nothing says what {out} should hold; consolidate again, or, if "
            "the weights are right, remove it"
        ) from None


def _parsed_sums(lines: Sequence[str]) -> dict[str, FileSums]:
    """Raises ValueError where there is no line, and for a line that a sum file does not have."""
    found: dict[str, FileSums] = {}
    for line in lines:
        if match := LINE.fullmatch(line):
            found[match[2]] = FileSums(match[1])
        elif (match := BLOCKS.fullmatch(line)) and match[4] in found:
            size, block, blocks, name = int(match[1]), int(match[2]), match[3], match[4]
            if block == 0 or len(blocks) != DIGEST * ((size + block - 1) // block):
                raise ValueError(line)
            found[name] = FileSums(found[name].whole, size, block, blocks)
        else:
            raise ValueError(line)
    if not found:
        raise ValueError("no line")
    return found


def checked_beside(out: Path) -> dict[str, CheckedFile]:
    """The files of a result, a file or a folder, by their own names, held against the sum file beside it;
    none where there is none.

    Raises CheckpointError when the sum file is damaged, or a file of it is missing or has another size.
    """
    if not sum_file(out).is_file():
        return {}
    found = read_sums(out)
    if out.is_file():  # a file and its sums may have been renamed
        by_name = {PurePath(name).name: sums for name, sums in found.items()}
        found = {out.name: by_name.get(out.name) or next(iter(found.values()))}
    note = sum_file(out).name
    checked = {}
    for name, sums in found.items():
        file = out / PurePath(name).name if out.is_dir() else out
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, but {note} names it; copy it again")
        size = file.stat().st_size
        if sums.size is not None and size != sums.size:
            raise CheckpointError(
                f"{file} has {size:,} bytes, {note} says {sums.size:,}; copy it again, or remove {note} if "
                "it is of another file"
            )
        if sums.size is None:  # a line of xxh128sum alone: the whole file is one block
            checked[file.name] = of_digests(file, size, sums.whole, note, block=max(size, 1))
        else:
            checked[file.name] = of_digests(file, size, sums.blocks, note, block=sums.block)
    return checked


def verify(out: Path) -> None:
    """Reads a result of `consolidate` again and holds it against its checksums. Raises CheckpointError naming
    what is missing or has changed."""
    out = Path(out)
    if not sum_file(out).is_file():
        raise CheckpointError(f"there is no {sum_file(out)}, so nothing says what {out} should hold")
    expected = read_sums(out)
    missing = [name for name in expected if not (out.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{out.parent / missing[0]} is missing, but {sum_file(out).name} names it; copy it again"
        )
    for name, sums in expected.items():
        size = (out.parent / name).stat().st_size
        with (out.parent / name).open("rb") as file, progress(f"verifying {name}", size, BYTES) as seen:
            found = xxhash.xxh3_128()
            while piece := file.read(2**22):
                found.update(piece)
                seen.advance(len(piece))
            if found.hexdigest() != sums.whole:
                raise DamagedError(
                    f"{out.parent / name} is not what was written: its checksum is {found.hexdigest()}, "
                    f"{sum_file(out).name} has {sums.whole}; copy it again"
                )
