"""What wandb has written into the files of its runs, by its own protocol buffers.

A .wandb file is a LevelDB log behind a header of 7 bytes: blocks of 32 KiB, in them pieces of records, each with
checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 2**15
FILE_HEADER, PIECE_HEADER = 7, 7


def messages(path: Path) -> list[bytes]:
    data, at, found, message = path.read_bytes(), FILE_HEADER, [], b""
    assert data[:4] == b":W&B"
    while at + PIECE_HEADER <= len(data):
        if BLOCK - at % BLOCK < PIECE_HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + PIECE_HEADER : at + PIECE_HEADER + length]
        at += PIECE_HEADER + length
        if kind in (1, 4):
            found.append(message)
            message = b""
    return found


@dataclass
class WandbFile:
    """One start of a run. rows: wandb's own step and the values of each row of its history."""

    id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None


def read_wandb(path: Path) -> WandbFile:
    from wandb.proto.wandb_internal_pb2 import Record

    read = WandbFile()
    for message in messages(path):
        record = Record.FromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            read.id = record.run.run_id
            read.config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
        elif kind == "history":
            values = {
                each.key or "/".join(each.nested_key): json.loads(each.value_json)
                for each in record.history.item
            }
            read.rows.append((record.history.step.num, values))
        elif kind == "summary":
            for each in record.summary.update:
                read.summary[each.key or "/".join(each.nested_key)] = json.loads(each.value_json)
        elif kind == "metric":
            read.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            read.artifacts.append(record.artifact)
        elif kind == "exit":
            read.exit_code = record.exit.exit_code
    return read


def wandb_files(work_dir: Path) -> list[WandbFile]:
    """Those of each start, in their order, once the process that writes them has ended."""
    import wandb

    wandb.teardown()
    return [read_wandb(path) for path in sorted((work_dir / "wandb").glob("*run-*/*.wandb"))]
