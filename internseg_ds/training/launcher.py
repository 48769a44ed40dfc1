"""Whether the processes that started this one, and wait for its end, are still there: a training whose
launcher has gone has nobody to end it any more.

In: the processes above this one, as far as they are launchers. A shell, a batch script, nohup and the like
are none: they may go at any time.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import psutil

NAMES = {
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "mpirun",
    "mpiexec",
    "mpiexec.hydra",
    "hydra_pmi_proxy",
    "orterun",
    "orted",
    "prterun",
    "prted",
    "slurmstepd",
    "slurmstepd:",
}
"""Of programs and of Python's modules."""


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of a launcher."""
    # slurmstepd's is one word: "slurmstepd: [JOB.STEP]"
    words = [Path(word.split(" ")[0]).name for word in command]
    if words and words[0].startswith("python"):
        words = [word for word in words[1:] if not word.startswith("-")]
    return bool(words) and words[0] in NAMES


class Launcher:
    """The launchers above this process: its parent, the parent's parent (deepspeed's runner above its
    launch.py), and so on."""

    def __init__(self) -> None:
        self._chain = [psutil.Process()]
        try:
            while (above := self._chain[-1].parent()) is not None and is_launcher(above.cmdline()):
                self._chain.append(above)
        except psutil.Error:
            pass  # another user's

    def gone(self) -> bool:
        """Whether one of them has ended: what it had started has another parent then."""
        try:
            return any(child.ppid() != parent.pid for child, parent in pairwise(self._chain))
        except psutil.NoSuchProcess:
            return True
