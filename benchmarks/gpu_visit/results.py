"""The file of a visit: a JSON line for each result, written as it is had, and read again by later calls,
tables and reports.

Imports no torch, so that the process that watches over the others takes neither time to start nor memory of
the GPU.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FINAL = ("measured", "skipped", "out of memory", "passed")
"""Statuses of results that a later call need not try again."""
Line = dict[str, Any]


@cache
def identity(rehearsal: bool) -> dict[str, Any]:
    """What every line says of where it was measured: card, driver, versions, commit. rehearsal: on the CPU,
    whatever the machine has."""
    card, driver = (f"CPU ({platform.machine()}, {os.cpu_count()} cores)", "") if rehearsal else _card()
    return {
        "card": card,
        "driver": driver,
        "rehearsal": rehearsal,
        "python": platform.python_version(),
        "commit": os.environ.get("ON_ONE_GPU_COMMIT") or _commit(),
        **{name: _version(name) for name in ("torch", "triton", "deepspeed")},
    }


def _card() -> tuple[str, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        name, driver = done.stdout.splitlines()[0].rsplit(", ", 1)
        return name.strip(), driver.strip()
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return "unknown GPU", ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
        )
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


class Results:
    """results.jsonl of a folder. earlier: other such files whose results count as had."""

    def __init__(self, folder: Path, *, rehearsal: bool, earlier: Iterable[Path] = ()) -> None:
        self.path, self.rehearsal, self.earlier = folder / "results.jsonl", rehearsal, tuple(earlier)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, job: str, status: str, **values: Any) -> Line:
        """Writes a line, which is on the disk when this returns. values: name, settings, figures, planned,
        why, text."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "part": part,
            "job": job,
            "status": status,
            **values,
            **identity(self.rehearsal),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def lines(self) -> list[Line]:
        """All that count here: of this file and of the earlier ones, measured on the same card."""
        own = identity(self.rehearsal)
        return [
            line
            for path in dict.fromkeys([*self.earlier, self.path])
            for line in read(path)
            if line["card"] == own["card"] and line["rehearsal"] == self.rehearsal
        ]

    def finished(self) -> set[str]:
        """Jobs that came to their end."""
        return {line["job"] for line in self.lines() if line["status"] == "done"}

    def had(self, *, failed: bool = False) -> set[str]:
        """Keys of results that need not be measured again. failed: those that failed, too."""
        statuses = (*FINAL, "failed") if failed else FINAL
        return {
            key(line["job"], line["name"], line.get("settings", {}))
            for line in self.lines()
            if line["status"] in statuses and "name" in line
        }


def key(job: str, name: str, settings: Mapping[str, Any]) -> str:
    return json.dumps([job, name, settings], sort_keys=True, default=str)


def read(path: Path) -> list[Line]:
    """The lines of a file; of one that was cut off while it was written, those before."""
    lines: list[Line] = []
    if not path.is_file():
        return lines
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
