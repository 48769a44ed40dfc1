"""Lines of a log that survive a full disk: what finds no room waits in memory, and is written with the next
lines once there is some."""

import logging
from pathlib import Path

log = logging.getLogger(__name__)


class BufferedLines:
    """Appends to one file, of which this process is the only writer. Never raises OSError; a warning says that
    lines wait."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False

    def add(self, text: str) -> None:
        """Writes what waits, then `text`; with "" it only tries again. Where there is no room, the file may
        end with part of a line until there is."""
        self._waiting += text.encode()
        try:
            # opened each time: it may have been moved, or have been away
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                self._warned = True  # before the warning, whose own line may come back here
                log.warning(
                    "%s cannot be written: %s; its lines wait in memory until it can",
                    self.path,
                    error.strerror or error,
                )
        else:
            self._warned = False
