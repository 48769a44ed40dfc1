"""What a job measures with: each setting is timed, written, and forgiven when it fails; one that was had
before, or for which there is no time, is left out."""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_visit.results import Line, Results, key
from internseg_ds.device import device_type
from internseg_ds.planning.devices import DEVICES, Device

UNFINISHED = 75
"""Exit code of a job that has settings left to measure."""


class OutOfTime(Exception):
    """There is no time for another setting."""


class Spoilt(Exception):
    """What is measured cannot be trusted to go on after what has just failed; a fresh process can."""


@dataclass
class Visit:
    """part, job: of the line. deadline: of `time.monotonic`, after which no setting is begun. scratch: a
    folder for large files, or None: wherever there is room. had: keys of results that are there already.
    ds_config: what 6 B and the other recipes train under, None: what fits by the plan."""

    results: Results
    part: str
    job: str
    rehearse: bool
    deadline: float
    scratch: Path | None = None
    had: set[str] = field(default_factory=set)
    ds_config: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(device_type())

    def is_had(self, name: str, settings: Mapping[str, Any]) -> bool:
        return key(self.job, name, settings) in self.had

    def add(self, status: str, **values: Any) -> Line:
        return self.results.add(self.part, self.job, status, **values)

    def measure(
        self,
        name: str,
        settings: Mapping[str, Any],
        run: Callable[[], Mapping[str, Any]],
        *,
        planned: Mapping[str, Any] | None = None,
    ) -> Line | None:
        """Writes what `run` found under a name and settings; None where it was had before. An error becomes a
        line as well, and the job goes on.

        Raises OutOfTime when the deadline is over, Spoilt when the GPU does not answer any more.
        """
        if self.is_had(name, settings):
            return None
        if time.monotonic() > self.deadline:
            raise OutOfTime
        found: dict[str, Any] = {
            "name": name,
            "settings": dict(settings),
            **({"planned": dict(planned)} if planned else {}),
        }
        began = time.monotonic()
        try:
            figures = dict(run())
        except torch.OutOfMemoryError as error:
            status, found["why"] = "out of memory", _first_line(error)
        except Exception as error:
            traceback.print_exc()
            status, found["why"] = "failed", f"{type(error).__name__}: {_first_line(error)}"
        else:
            status, found["figures"] = "measured", figures
        line = self.add(status, **found, took_s=round(time.monotonic() - began, 3))
        try:
            free(self.device)
        except RuntimeError as error:  # an illegal address, say: nothing works in this process any more
            raise Spoilt(f"{name}: {_first_line(error)}") from error
        return line

    def skip(
        self, name: str, settings: Mapping[str, Any], why: str, *, planned: Mapping[str, Any] | None = None
    ) -> None:
        if not self.is_had(name, settings):
            self.add(
                "skipped",
                name=name,
                settings=dict(settings),
                why=why,
                **({"planned": dict(planned)} if planned else {}),
            )


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def free(device: torch.device) -> None:
    """Gives back what the last setting has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def data_sheet(card: str) -> Device | None:
    """The planner's entry of a card, by the name that its driver gives it; None for one that it does not
    know."""
    names = [
        name
        for name in DEVICES
        if all(word.lower() in card.lower().replace(" ", "") for word in name.split("-"))
    ]
    return DEVICES[max(names, key=len)] if names else None
