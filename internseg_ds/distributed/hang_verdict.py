"""Which rank the others wait for, when no rank makes progress: decided by where each rank stands, and by
whether its main thread is in a call that waits.

Under gloo a rank waits inside a collective. Under nccl collectives only join the GPU's queue: the host runs
ahead, and waits at the next place that needs a value or a free buffer (`.item()`, `synchronize()`), in any
file. A rank whose GPU hangs waits in such a call too.
"""

import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from internseg_ds.distributed.zero_internals import COLLECTIVE_FILES, NVTX_FILE, RUNTIME_FILES
from internseg_ds.exit_codes import LOST
from internseg_ds.torch_internals import BACKWARD_FILE, BACKWARD_FUNCTION

Doing = Literal[
    "building", "data", "forward", "backward", "update", "agreeing", "evaluating", "saving", "idle"
]
STEP_PARTS: tuple[Doing, ...] = ("data", "forward", "backward", "update", "agreeing")
"""In the order of a step: a rank at an earlier part keeps the others waiting."""


@dataclass(frozen=True)
class RankStatus:
    """Where a rank stands.

    marks: how often it has made progress; stands_s: seconds since it last did. line: of its main thread;
    waits: whether that line waits for other ranks or for the GPU.
    """

    rank: int
    host: str
    process: int
    step: int = 0
    micro_batch: int = 0
    doing: Doing = "building"
    marks: int = 0
    line: str = ""
    waits: bool = False
    stands_s: float = 0.0
    asked_to_stop: bool = False
    left: bool = False
    failure: str = ""
    """The error that the rank ends with, as long as no other rank is known to be its reason."""
    code: int = LOST
    """The exit code of the other ranks when this one is gone."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Grows as the rank makes progress."""
        last = len(STEP_PARTS)
        return (
            self.step,
            self.micro_batch,
            STEP_PARTS.index(self.doing) if self.doing in STEP_PARTS else last,
        )

    @property
    def fate(self) -> str:
        """What happened to a rank whose connection is closed."""
        return f"{self} ended with {self.failure}" if self.failure else f"{self} died"

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (host {self.host}, process {self.process}) at step {self.step}, {self.doing}"
        )


IN_COLLECTIVE = ("/torch/distributed/", COLLECTIVE_FILES)
"""Parts of paths: a thread with such a file on its stack is in a collective."""
IN_BACKWARD = (RUNTIME_FILES, "/torch/utils/checkpoint.py", "/torch/autograd/")
"""Parts of paths: a thread of autograd's has such a file on its stack when it runs Python."""
WAITING_CALL = re.compile(
    r"\.(?:_cuda_)?(item|tolist|cpu|numpy|nonzero|wait|synchronize|result)\)?\(|\b(bool|float|int)\("
)
"""In a line of source at whose call the host may wait for the GPU. A guess: indexing by a mask, or `if
tensor:`, is not recognised, and such a call may be other work, which then counts as waiting."""


def line_of(thread: int) -> tuple[str, bool]:
    """(file:line function of a thread's innermost frame, whether it waits there for other ranks or for the
    GPU).

    thread: its identifier. During a backward pass on a GPU, the frame is that of the thread which runs
    autograd's Python hooks. If none runs Python, the pass is in torch's own code, which fills the GPU's
    queue: it counts as waiting.
    """
    frames = sys._current_frames()
    try:
        return _line_in(frames, thread)
    finally:
        # it holds this function's own frame and so itself, and with it the frames of the main thread: feature
        # maps that a step is done with would stay until Python's garbage collector comes by
        frames.clear()


def _line_in(frames: Mapping[int, FrameType], thread: int) -> tuple[str, bool]:
    """`line_of` by the innermost frames of all threads."""
    frame = frames.get(thread)
    if frame is None:
        return "", False
    if frame.f_code.co_filename.endswith(f"/{BACKWARD_FILE}") and frame.f_code.co_name == BACKWARD_FUNCTION:
        others = (other for identifier, other in frames.items() if identifier != thread)
        hook = next((other for other in others if _has_file(other, IN_BACKWARD)), None)
        if hook is None:
            return f"{BACKWARD_FILE}:{frame.f_lineno} {BACKWARD_FUNCTION}", True
        frame = hook
    # wraps a function that may have no frame of its own, as torch's `wait`: the caller's line tells more
    if frame.f_code.co_filename.endswith(NVTX_FILE) and frame.f_back is not None:
        frame = frame.f_back
    path = frame.f_code.co_filename
    line = f"{'/'.join(path.split('/')[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
    waits = WAITING_CALL.search(linecache.getline(path, frame.f_lineno or 0)) is not None
    return line, waits or _has_file(frame, IN_COLLECTIVE)


def _has_file(frame: FrameType | None, parts: Sequence[str]) -> bool:
    """Whether the path of the frame's file, or of a caller's file, has one of these parts."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in parts):
            return True
        frame = frame.f_back
    return False


def verdict(everybody: list[RankStatus], hang_s: float) -> tuple[str, RankStatus]:
    """(a sentence on which rank the others wait for, the status of that rank), when no rank has made progress
    for `hang_s` seconds.

    It is a rank that is in no waiting call, and of several the one with the least progress. Where all are in
    waiting calls, it is undecided: a rank with less progress may wait for one with more whose GPU hangs. Then
    all are named, first the one that got there last.
    """
    working = [status for status in everybody if not status.waits]
    least = min((status.order for status in working), default=None)
    suspects = [status for status in working if status.order == least]
    began = f"no rank has got on for {hang_s:.0f} s: "
    if suspects:
        others = len(everybody) - len(suspects)
        names = "; ".join(f"{status} ({status.line})" for status in suspects[:4])
        found = f"the other {others} wait for {names}" if others else f"all are at work, or hang, {names}"
        return began + found, suspects[0]
    last_first = sorted(everybody, key=lambda status: status.stands_s)
    names = "; ".join(
        f"{status} ({status.line}), there for {status.stands_s:.0f} s" for status in last_first[:4]
    )
    more = f", and {len(last_first) - 4} more" if len(last_first) > 4 else ""
    return (
        f"{began}all wait, for each other or for a GPU that hangs; who got there last stands first: "
        f"{names}{more}",
        last_first[0],
    )
