"""Python's garbage collector in step: every rank collects at the same moment of a training, and at no other.

By itself Python collects whenever a thread has made enough objects, which is another moment on each rank, and
looks at everything that setting up has left behind; the other ranks wait in their next collective for the one
that pauses. torchtitan, lingua and nanochat do likewise.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

YOUNG = 1
"""The generations up to this one hold what the step has made. What it keeps is looked at again where the
training pauses."""


class SteppedCollector:
    """A `with` block around a training: inside, no collection happens but those of `after_step`.

    Objects that are there on entering are taken for permanent and never looked at. On leaving, Python's
    collector is as it was before.
    """

    def __enter__(self) -> "SteppedCollector":
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    @contextmanager
    def after_step(self, *, pauses: bool) -> Iterator[None]:
        """Around what comes after a step. pauses: whether that is a save or an evaluation.

        Collects every step, for a model's own code may leave tensors in reference cycles, whose memory the
        next step needs. That is quick, since a step leaves some hundred objects and those of before are
        frozen.
        """
        if pauses:
            with self.automatic():
                yield
            return
        gc.collect(YOUNG)
        yield

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Around a save or an evaluation: Python collects by itself inside, and everything since `__enter__`
        is looked at in the end."""
        gc.enable()
        try:
            yield
        finally:
            gc.disable()
            gc.collect()
