"""A small disk of its own for a run: a file with an ext4 file system, which can be filled, used up by number
of files, and frozen. Needs root."""

import os
import shutil
import subprocess
from pathlib import Path


class Disk:
    """A file system of `mib` MiB with room for `files` files, mounted at `folder` until `close`."""

    def __init__(self, image: Path, folder: Path, *, mib: int, files: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(mib * 2**20)
        _run("mkfs.ext4", "-q", "-m", "0", "-N", str(files), image)
        _run("mount", "-o", "loop", image, folder)

    def fill(self) -> None:
        """Leaves no byte free for files."""
        filler = self._filler()
        with filler.joinpath("bytes").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self.folder).free - 2**20))
            file.seek(0, os.SEEK_END)
            try:
                while True:  # what the file system keeps for its own lists
                    file.write(bytes(4096))
                    file.flush()
            except OSError:
                pass

    def use_up_inodes(self) -> None:
        """Leaves room for no new file."""
        filler = self._filler()
        for number in range(os.statvfs(self.folder).f_ffree):
            filler.joinpath(str(number)).touch()

    def make_room(self) -> None:
        """Takes back what `fill` and `use_up_inodes` did."""
        shutil.rmtree(self.folder / "filler", ignore_errors=True)

    def freeze(self) -> None:
        """Whoever writes waits, in state D, until `thaw`."""
        _run("fsfreeze", "--freeze", self.folder)

    def thaw(self) -> None:
        # it may not be frozen
        subprocess.run(["fsfreeze", "--unfreeze", str(self.folder)], capture_output=True)

    def close(self) -> None:
        self.thaw()
        _run("umount", "--lazy", self.folder)

    def _filler(self) -> Path:
        filler = self.folder / "filler"
        filler.mkdir()
        return filler


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)
