"""Lines of a record that outlive a full disk: what finds no room waits in memory, and is written with the next lines
once there is some."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)


class LateLines:
    """Adds to the end of one file, of which this process is the only writer. Never raises for the disk's sake; a warning
    says that lines wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._late = False

    def add(self, text: str) -> None:
        """Writes what waits, and `text`; "" tries again only. Where there is no room, part of a line may be there until
        there is."""
        self._waiting += text.encode()
        try:
            with self.path.open(
                "ab", buffering=0
            ) as file:  # opened each time: it may have been moved, or have been away
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not self._late:
                self._late = True  # before the warning, which may come back here
                log.warning(
                    "%s cannot be written: %s; its lines wait in memory until it can",
                    self.path,
                    error.strerror or error,
                )
        else:
            self._late = False
