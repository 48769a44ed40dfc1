"""Whose Python a step under ZeRO spends, and where the seconds before the third step go: 48 blocks of a width of
64, so that calls are nearly all there is.

    python benchmarks/host_time.py [--deepspeed_config JSON] [--profiled 3]

One process. Prints wall-clock and CPU seconds of each part up to the third step, then CPU milliseconds of an
unprofiled step, and of profiled ones the CPU time in functions of our models, of the rest of our package, of
DeepSpeed, and of all other files (torch's operators among them; the profiler makes calls dearer); then the
dearest functions of ours and of DeepSpeed. Ends with a line of JSON.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

STEADY = 5
"""Steps whose median is reported."""


class Laps:
    """Seconds of wall clock and of CPU since the last call, by what they went into."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}
        self._last = time.perf_counter(), time.process_time()

    def end(self, what: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.found[what] = now[0] - self._last[0], now[1] - self._last[1]
        print(f"{what}: {self.found[what][0]:.2f} s, {self.found[what][1]:.2f} s of CPU", flush=True)
        self._last = now


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", "--deepspeed-config", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--profiled", type=int, default=3, help="steps (default: %(default)s)")
    args = parser.parse_args()
    laps = Laps()
    from internseg_ds import SegmentorEngine

    laps.end("imports")
    from workload import Workload, ds_config_of, vit

    experiment = Workload(options=vit(64, 48, 2)).experiment
    raw = ds_config_of(args.deepspeed_config, "bfloat16")
    with (
        tempfile.TemporaryDirectory() as folder,
        SegmentorEngine(experiment, raw, work_dir=folder, validate=False) as engine,
    ):
        laps.end("validate, join and build")
        step = stepper(engine)
        for number in range(1, 4):
            step()
            laps.end(f"step {number}")
        parts = [step() for _ in range(STEADY)]
        medians = {name: 1000 * statistics.median(part[name] for part in parts) for name in parts[0]}
        profile = cProfile.Profile(time.process_time)
        profile.enable()
        for _ in range(args.profiled):
            step()
        profile.disable()
    print("a step, ms of CPU:", {name: round(value, 1) for name, value in medians.items()})
    owners = by_owner(profile, args.profiled)
    print(json.dumps({"laps": laps.found, "step_ms": medians, "profiled_ms": owners}))


def stepper(engine: Any) -> Callable[[], dict[str, float]]:
    """One step on the same batch; it returns CPU seconds of its parts."""
    from internseg_ds.data.loading import training_batches
    from internseg_ds.data.sampler import GlobalBatchSampler

    data, deepspeed = engine.plan.train_set, engine.deepspeed
    sampler = GlobalBatchSampler(len(data), engine.plan.ds.micro_batch)
    batch = next(training_batches(data, sampler, workers=0, seed=0, device=engine.world.device))
    deepspeed.train()

    def step() -> dict[str, float]:
        began = time.process_time()
        loss = engine.forward(batch)["loss"]
        after_forward = time.process_time()
        deepspeed.backward(loss)
        after_backward = time.process_time()
        deepspeed.step()
        return {
            "forward": after_forward - began,
            "backward": after_backward - after_forward,
            "step": time.process_time() - after_backward,
        }

    return step


def by_owner(profile: cProfile.Profile, steps: int) -> dict[str, float]:
    """Milliseconds a step in functions of each owner; prints the dearest."""
    totals: dict[str, float] = defaultdict(float)
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    stats: Any = pstats.Stats(profile)
    for (file, line, function), (_, calls, own, *_) in stats.stats.items():
        owner = next((name for name, part in OWNERS.items() if part in file), "other")
        totals[owner] += 1000 * own / steps
        where = f"{file.rsplit('/', 1)[-1]}:{line} {function}"
        rows[owner].append((1000 * own / steps, f"{calls / steps:.0f} calls of {where}"))
    for owner in OWNERS:
        print(f"{owner}, ms of its own:")
        for own_ms, text in sorted(rows[owner], reverse=True)[:8]:
            print(f"  {own_ms:.2f} {text}")
    return dict(totals)


OWNERS = {
    "our models": "/internseg_ds/models/",
    "ours beside them": "/internseg_ds/",
    "DeepSpeed": "/deepspeed/",
}
"""The first whose text is in the name of a file."""


if __name__ == "__main__":
    main()
