"""The first seconds of a command, in which it imports what it needs: it says so, and begins its log.

Needs the standard library only.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from internseg_ds.monitoring.run_log import begin_log
from internseg_ds.progress import stage

QUIET = {"-h", "--help", "--version"}
"""Options that only print something."""


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Around the first imports of a command that runs a model."""
    if not QUIET.isdisjoint(sys.argv):
        yield
        return
    begin_log()
    with stage(f"loading {what}"):
        yield
