"""Training images that cannot be used: named once each, kept in a file, and too many of them end the run."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from internseg_ds.distributed.process_group import gather_from_ranks
from internseg_ds.errors import DataError
from internseg_ds.monitoring.buffered_lines import BufferedLines

log = logging.getLogger(__name__)


class BadImages:
    """What was wrong with the images of one run. `pending` is this rank's affair; `share` is collective."""

    def __init__(self, file: Path, limit: int, *, start: int = 0) -> None:
        """file: has a line for each; a run that goes on from a step `start` knows those. limit: how many
        different ones a run may have (`engine.max_data_faults`). Collective."""
        self.file, self.limit, self._lines = file, limit, BufferedLines(file)
        noted = (
            file.read_text(errors="replace").splitlines()
            if dist.get_rank() == 0 and start and file.exists()
            else []
        )
        self.known: set[str] = set(gather_from_ranks(noted)[0])
        """Of all ranks."""
        if dist.get_rank() == 0 and not start:
            file.unlink(missing_ok=True)
        self.pending: set[str] = set()
        """Of this rank, not shared yet."""

    def add(self, faults: Iterable[str]) -> None:
        self.pending |= set(faults) - self.known

    def share(self) -> None:
        """Tells all ranks of all ranks' pending faults. Raises DataError, on every rank, when there are more
        than the limit. Collective."""
        new = sorted(set().union(*gather_from_ranks(self.pending)) - self.known)
        self.known |= set(new)
        self.pending = set()
        is_main = dist.get_rank() == 0
        if is_main:
            self._lines.add("".join(f"{fault}\n" for fault in new))
        if len(self.known) > self.limit:
            raise DataError(
                f"{new[-1]}"
                + (
                    f" ({len(self.known)} damaged training images are more than "
                    f"engine.max_data_faults={self.limit}; {self.file} names them)"
                    if self.limit
                    else "; with engine.max_data_faults=10 up to 10 such images would be replaced by others"
                )
            )
        for fault in new if is_main else ():
            log.warning(
                "%s; another image takes its place (%d of at most %d)", fault, len(self.known), self.limit
            )
