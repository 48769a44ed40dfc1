"""What Python's garbage collector costs a training: left to itself, and at the end of each step alone
(`internseg_ds/garbage_collection.py`), in turn, in one run.

    deepspeed --num_gpus 2 benchmarks/garbage_collection.py [--config CONFIG] [--deepspeed_config JSON] [--rounds 6]

The real loop of one engine on generated images. Prints for each way seconds per step (median of the rounds'
means), and of the collections during its steps: how many, their seconds per step, the longest, and in how
many steps some ranks collected and others did not. Ends with a line of JSON: ratio = seconds per step at the
ends of steps over those by itself.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timing import train_on
from workload import TINY, Workload, ds_config_of

from internseg_ds import SegmentorEngine
from internseg_ds.cli import command_line
from internseg_ds.garbage_collection import SteppedCollector
from internseg_ds.training import trainer

STEPS = 20


class ByItself(SteppedCollector):
    """Python's own collector, untouched."""

    def __enter__(self) -> "ByItself":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    @contextmanager
    def after_step(self, *, pauses: bool) -> Iterator[None]:
        yield

    @contextmanager
    def automatic(self) -> Iterator[None]:
        yield


WAYS: dict[str, type[SteppedCollector]] = {"by itself": ByItself, "at the ends of steps": SteppedCollector}


class Pauses:
    """Seconds of each collection during the steps of a `with` block, by step."""

    def __init__(self, engine: SegmentorEngine) -> None:
        self._engine = engine
        self._first = engine.state.step
        self.seconds: dict[int, list[float]] = defaultdict(list)
        self._began = 0.0

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif (
            0 < self._engine.state.step - self._first < STEPS
        ):  # neither before the first nor behind the last
            self.seconds[self._engine.state.step].append(time.perf_counter() - self._began)

    def __enter__(self) -> "Pauses":
        gc.callbacks.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        gc.callbacks.remove(self)


def one_round(engine: SegmentorEngine, way: type[SteppedCollector]) -> dict[str, Any]:
    """Some steps of the loop; the collections are those of all ranks."""
    trainer.SteppedCollector = way  # type: ignore[misc]
    gc.collect()
    with Pauses(engine) as pauses:
        train_on(engine, STEPS, log_every=STEPS)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, dict(pauses.seconds))
    steps = {step for found in of_ranks for step in found}
    return {
        "s": seconds_per_step(engine),
        "pauses": [pause for found in of_ranks for each in found.values() for pause in each],
        "apart": sum(len({step in found for found in of_ranks}) > 1 for step in steps),
    }


def seconds_per_step(engine: SegmentorEngine) -> float:
    """Of the steps of the last record, without what the loop does before and behind them; 0 on ranks that
    write none."""
    if not engine.world.is_main:
        return 0.0
    records = [json.loads(line) for line in (engine.work_dir / "metrics.jsonl").read_text().splitlines()]
    return engine.plan.ds.global_batch / records[-1]["images_per_s"]


def summary(rounds: list[dict[str, Any]], ranks: int) -> dict[str, float]:
    pauses = [pause for round_ in rounds for pause in round_["pauses"]]
    steps = STEPS * len(rounds)
    return {
        "s": round(statistics.median(round_["s"] for round_ in rounds), 5),
        "collections_per_step_and_rank": round(len(pauses) / steps / ranks, 3),
        "collecting_ms_per_step_and_rank": round(1e3 * sum(pauses) / steps / ranks, 3),
        "longest_ms": round(1e3 * max(pauses, default=0.0), 2),
        "median_ms": round(1e3 * statistics.median(pauses or [0.0]), 3),
        "share_of_steps_apart": round(sum(round_["apart"] for round_ in rounds) / steps, 3),
    }


def main() -> None:
    parser = command_line.parser(
        __doc__.splitlines()[0], "deepspeed --num_gpus 2 benchmarks/garbage_collection.py"
    )
    parser.add_argument("--config", default=TINY)
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    # one for all ranks
    folder = Path(tempfile.gettempdir(), f"garbage_collection_{os.environ.get('MASTER_PORT', 'alone')}")
    cfg = Workload(config=args.config, micro_batch=2).experiment
    ds_config = ds_config_of(args.deepspeed_config, "bfloat16")
    with SegmentorEngine(cfg, ds_config, work_dir=folder, validate=False, saves=False) as engine:
        train_on(engine, 5, log_every=5)
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
        for number in range(args.rounds):
            for name in list(WAYS)[:: 1 if number % 2 else -1]:
                rounds[name].append(one_round(engine, WAYS[name]))
        if engine.world.is_main:
            found = {name: summary(each, engine.world.size) for name, each in rounds.items()}
            for name, row in found.items():
                print(f"{name:22} " + "  ".join(f"{key} {value:g}" for key, value in row.items()))
            first, second = (row["s"] for row in found.values())
            print(json.dumps({"ratio": round(second / first, 4), "steps": STEPS * args.rounds, **found}))


if __name__ == "__main__":
    command_line.run(main)
