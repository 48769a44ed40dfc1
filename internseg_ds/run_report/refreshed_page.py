"""The page of a run while it trains: made again in a thread of its own, so that no step waits for it, whatever
goes wrong with it."""

import logging
from pathlib import Path
from threading import Thread

from internseg_ds.errors import reason_of
from internseg_ds.run_report.page import write_run_page

log = logging.getLogger(__name__)

WAIT_S = 20.0
"""Seconds that a run waits at most for a page that is being made, before it evaluates again and at its end. One
of 80,000 records takes some two."""


class RefreshedPage:
    """Of one work directory, by one process. No method raises anything."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self._thread: Thread | None = None

    def refresh(self) -> None:
        """Begins to make the page anew, unless it is still being made."""
        if self._thread is not None and self._thread.is_alive():
            log.info("report.html of this step is left out: the one before is still being written")
            return
        # a process that ends does not wait for it
        self._thread = Thread(target=self._write, name="report.html", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the page is there, or after WAIT_S."""
        if self._thread is not None:
            self._thread.join(WAIT_S)

    def close(self) -> None:
        """Makes the last one."""
        self.wait()
        self.refresh()
        self.wait()

    def _write(self) -> None:
        try:
            write_run_page(self.work_dir)
        except Exception as error:  # a page is no reason to end a training
            log.warning("report.html is not written: %s; the training goes on", reason_of(error))
