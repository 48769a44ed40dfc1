"""Training commands small enough to be killed and started again."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY, data_options
from tests.end_to_end.conftest import SMALL

STEPS, SAVED = 12, 3


@pytest.fixture
def training(ade20k: Path) -> Callable[..., list[str]]:
    """training(work_dir, *arguments) -> launch/train.py and its arguments: STEPS steps of the small model,
    saved every SAVED."""

    def words(work_dir: Path, *arguments: object) -> list[str]:
        return [
            "launch/train.py",
            TINY,
            "--work-dir",
            str(work_dir),
            "--no-validate",
            *map(str, arguments),
            "--cfg-options",
            *SMALL,
            *data_options(ade20k),
            f"runner.max_iters={STEPS}",
            f"checkpoint_config.interval={SAVED}",
        ]

    return words


def steps_of(work_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
