"""The JSON in and beside weight files: safetensors headers, indices of shards, config.json.

They may come from anywhere: what is read is bounded, and what cannot be used is a CheckpointError.
"""

import json
from pathlib import Path
from typing import Any

from internseg_ds.errors import CheckpointError, reason_of

LARGEST = 16 * 2**20
"""Bytes that are read. The index of a model of 400 G parameters has 0.1 MiB; a header of so many holds more
than 100,000 names."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when there is none, or it is too large."""
    with path.open("rb") as file:
        text = file.read(LARGEST + 1)
    return object_in(text, str(path))


def object_in(text: bytes | str, where: str) -> dict[str, Any]:
    """The same of a text; where: what names it in the error."""
    if len(text) > LARGEST:
        raise CheckpointError(
            f"{where} has more than {LARGEST / 2**20:.0f} MiB, which no model's has; take another file"
        )
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged ({reason_of(error)[:120]}); copy it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where} is damaged: it holds a {type(found).__name__}, and no object of names; copy it again"
        )
    return found
