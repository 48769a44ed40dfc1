"""Whether the processes that started this one, and wait for its end, are still there: a training whose
launcher has gone has nobody to end it any more.

In: the processes above this one, as far as they are launchers. A shell, a batch script, nohup and the like
are none: they may go at any time. Also the command that goes on with a training.
"""

import shlex
import shutil
import sys
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
TRAINING = {"train.py", "internseg-train", "internseg_ds.cli.train"}
"""What the command to train is called."""


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

    def resume_command(self) -> str:
        """What a user types, in the same folder, to go on with this process's training: the highest launcher's
        command line, or this process's own, with --resume auto. "" where it was not started by the command to
        train."""
        try:
            lines = [process.cmdline() for process in reversed(self._chain[1:])]
        except psutil.Error:
            lines = []
        for words in (*lines, [sys.executable, *sys.argv]):
            if any(Path(word).name in TRAINING for word in words):
                return f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(resuming(words))}"
        return ""


def resuming(words: Sequence[str]) -> list[str]:
    """A command line that trains, made to go on from the newest checkpoint."""
    kept: list[str] = []
    words = list(words)
    if (
        len(words) > 1
        and Path(words[0]).name.startswith("python")
        and shutil.which(Path(words[1]).name) == words[1]
    ):
        words[:2] = [Path(words[1]).name]  # a command that is a script, such as deepspeed
    takes_value = False
    for word in words:
        name = word.split("=")[0]
        if takes_value:
            takes_value = False
        elif name == "--resume":
            takes_value = "=" not in word
        elif name not in ("--overwrite", "--local_rank", "--local-rank"):
            kept.append(word)
    return [*kept, "--resume", "auto"]
