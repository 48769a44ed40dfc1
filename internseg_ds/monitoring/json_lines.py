"""Files of JSON lines as a run leaves them, whatever state it has left them in."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_object(line: str) -> dict[str, Any] | None:
    """None for what is none, as half a line of a run that was killed while it wrote."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_json_lines(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of a file; other lines are left out, and a file that cannot be read has none. most: lines that are
    read, None for all."""
    try:
        with path.open(errors="replace") as file:
            for number, line in enumerate(file):
                if number == most:
                    return
                if (found := json_object(line)) is not None:
                    yield found
    except OSError:
        return
