"""What a run has come to, beyond weights and optimizer: the small object that travels with every
checkpoint."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """step: optimizer updates done. images: images seen by all ranks together, the position in the data
    stream. best, best_tag: the best score so far and the checkpoint that holds it. seed: that of the data
    stream and the noise, so that a resumed run needs no --seed."""

    step: int = 0
    images: int = 0
    seed: int = 0
    best: float | None = None
    best_tag: str | None = None
    run: str = ""
    """What tells this run from others; a resumed one keeps it."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def due(step: int, every: int, last: int) -> bool:
    """The one rule for every cadence: log, save and evaluate each `every` steps, and at the last one."""
    return (every > 0 and step % every == 0) or step == last
