"""Whom the others wait for, when no rank gets on: told from where each stands, and whether its main thread is in a call that waits.

Under gloo a rank waits inside a collective. Under nccl collectives only join the GPU's queue: the host runs ahead, and waits at the next place that needs
a value or a free buffer (`.item()`, `synchronize()`), in whichever file that stands. A rank whose GPU hangs waits in such a call too.
"""

import linecache
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from internseg_ds.exit_codes import LOST

Doing = Literal[
    "building", "data", "forward", "backward", "update", "agreeing", "evaluating", "saving", "idle"
]
STEP_PARTS: tuple[Doing, ...] = ("data", "forward", "backward", "update", "agreeing")
"""In the order in which a step goes through them: a rank that stands at an earlier one keeps the others waiting."""


@dataclass(frozen=True)
class Place:
    """Where a rank stands. marks: how often it has got on; stands_s: seconds since it last did. line: of its main thread; waits: whether that waits there, for
    other ranks or for its GPU."""

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
    """The error that the rank leaves with, alone as far as it knows."""
    code: int = LOST
    """What the others end with when this one is gone."""

    @property
    def order(self) -> tuple[int, int, int]:
        """How far it has come."""
        return (
            self.step,
            self.micro_batch,
            STEP_PARTS.index(self.doing) if self.doing in STEP_PARTS else len(STEP_PARTS),
        )

    @property
    def fate(self) -> str:
        """Of a rank whose connection is gone."""
        return f"{self} ended with {self.failure}" if self.failure else f"{self} died"

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (host {self.host}, process {self.process}) at step {self.step}, {self.doing}"
        )


COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
"""Parts of paths: who has such a file on its stack is in a collective."""
WAITING_CALL = re.compile(
    r"\.(?:_cuda_)?(item|tolist|cpu|numpy|nonzero|wait|synchronize|result)\)?\(|\b(bool|float|int)\("
)
"""In a line of source at whose call the host may wait for what the GPU was given before. Not all of them: indexing by a mask, or `if tensor:`, looks like work;
and such a call may be other work, which then counts as waiting."""


WRAPPER = "/deepspeed/utils/nvtx.py"
"""Whose one function calls another, `instrument_w_nvtx(handle.wait)()`: where that has no frame of its own, as torch's `wait`, the caller's line tells more."""


BACKWARD = ("/torch/autograd/graph.py", "_engine_run_backward")
"""Where the main thread stands while autograd's own threads, one for each GPU, run the backward pass with its hooks."""
OF_BACKWARD = ("/deepspeed/runtime/", "/torch/utils/checkpoint.py", "/torch/autograd/")
"""Parts of paths that a thread of autograd has on its stack when it runs Python at all."""


def line_of(thread: int) -> tuple[str, bool]:
    """(file:line function of a thread's innermost frame, whether it waits there for other ranks or for the GPU).

    In a backward pass on a GPU, those of the thread that runs its Python hooks. Where none runs Python, the pass is in torch's own code, which gives work to
    the GPU until its queue is full: it waits, as far as can be told.
    """
    frames = sys._current_frames()
    frame: Any = frames.get(thread)
    if frame is None:
        return "", False
    if frame.f_code.co_filename.endswith(BACKWARD[0]) and frame.f_code.co_name == BACKWARD[1]:
        hooks = next(
            (other for ident, other in frames.items() if ident != thread and _has_file(other, OF_BACKWARD)),
            None,
        )
        if hooks is None:
            return f"{BACKWARD[0][1:]}:{frame.f_lineno} {BACKWARD[1]}", True
        frame = hooks
    if frame.f_code.co_filename.endswith(WRAPPER) and frame.f_back is not None:
        frame = frame.f_back
    code = frame.f_code
    place = f"{'/'.join(code.co_filename.split('/')[-3:])}:{frame.f_lineno} {code.co_name}"
    waits = WAITING_CALL.search(linecache.getline(code.co_filename, frame.f_lineno or 0)) is not None
    return place, waits or _has_file(frame, COLLECTIVES)


def _has_file(frame: Any, parts: tuple[str, ...]) -> bool:
    """Whether a frame, or one that called it, is of a file whose path has one of these parts."""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in parts):
            return True
        frame = frame.f_back
    return False


def verdict(everybody: list[Place], hang_s: float) -> tuple[str, Place]:
    """(a sentence on whom the others wait for, one of these). No rank has got on for hang_s seconds.

    Whoever is not in a waiting call, and of these who stands furthest behind. Where all are, nobody can be told: a rank that stands behind may wait for one
    ahead of it whose GPU hangs. Then all are named, first who got there last.
    """
    idle = [place for place in everybody if not place.waits]
    furthest = min((place.order for place in idle), default=None)
    suspects = [place for place in idle if place.order == furthest]
    began = f"no rank has got on for {hang_s:.0f} s: "
    if suspects:
        others = len(everybody) - len(suspects)
        names = "; ".join(f"{place} ({place.line})" for place in suspects[:4])
        return began + (
            f"the other {others} wait for {names}" if others else f"all are at work, or hang, {names}"
        ), suspects[0]
    last = sorted(everybody, key=lambda place: place.stands_s)
    names = "; ".join(f"{place} ({place.line}), there for {place.stands_s:.0f} s" for place in last[:4])
    more = f", and {len(last) - 4} more" if len(last) > 4 else ""
    return (
        f"{began}all wait, for each other or for a GPU that hangs; who got there last stands first: {names}{more}",
        last[0],
    )
