"""The clock that a run reads, moved while it runs (`moved_clock.c`). CLOCK_MONOTONIC stays, as on a real host."""

import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("moved_clock.c")


class Clock:
    """`environment` is what the processes need that are to read it."""

    def __init__(self, folder: Path) -> None:
        """folder: for the compiled library and the offset."""
        folder.mkdir()
        self._file = folder / "offset"
        self._file.write_bytes(struct.pack("q", 0))
        library = folder / "moved_clock.so"
        subprocess.run(
            ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-pthread"], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "SOAK_CLOCK": str(self._file)}

    def move(self, seconds: int) -> None:
        """From now on the clock is so much ahead of the machine's, or behind it."""
        with self._file.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("q", seconds))
