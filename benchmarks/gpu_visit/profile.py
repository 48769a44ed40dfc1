"""Where the time of a step goes: the project's own profile of some steps of an engine, and the kernels by
what they do."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from internseg_ds import SegmentorEngine
from internseg_ds.data.loading import Batch
from internseg_ds.monitoring.profiler import StepProfile
from internseg_ds.monitoring.trace_summary import KINDS, break_down, summarise

KERNELS = (
    ("copies to and from the host", re.compile(r"Memcpy (HtoD|DtoH)", re.IGNORECASE)),
    ("attention", re.compile(r"flash|fmha|sdpa|attention|softmax", re.IGNORECASE)),
    ("optimizer", re.compile(r"adam|multi_tensor", re.IGNORECASE)),
    (
        "convolutions",
        re.compile(r"conv|wgrad|dgrad|fprop|implicit|nchwToNhwc|nhwcToNchw|cudnn", re.IGNORECASE),
    ),
    ("matrix products", re.compile(r"gemm|cutlass|nvjet|cublas|splitK", re.IGNORECASE)),
    ("deformable sampling", re.compile(r"dcnv3|deform|grid_sampl", re.IGNORECASE)),
    ("norms", re.compile(r"norm|welford", re.IGNORECASE)),
    ("sums", re.compile(r"reduce", re.IGNORECASE)),
    ("copies and casts", re.compile(r"Memcpy|Memset|copy|cat_?array|fill", re.IGNORECASE)),
    ("elementwise", re.compile(r"elementwise|gelu|dropout|triton_", re.IGNORECASE)),
)
"""Kinds of kernels by their names, the first that fits: of a name such as `cudnn::..._flash_fprop_...` the
earlier."""
LONGEST = 15


def profile_of(engine: SegmentorEngine, batch: Batch, steps: int, folder: Path) -> Mapping[str, Any]:
    """Some steps on one micro-batch, of which the last ones are recorded. Figures: shares of the time by kind
    of work; `kernels` in ms a step; `text`: the project's table and the kernels that took longest."""
    world, forwards = engine.world, engine.deepspeed
    before = 2
    with StepProfile(
        folder, steps, forwards.module, world, engine.watch, start=0, last=steps + before
    ) as profile:
        for step in range(1, steps + before + 1):
            profile.at(step, "data")
            profile.at(step, "forward")
            loss = engine.forward(batch)["loss"]
            profile.at(step, "backward")
            forwards.backward(loss)
            profile.at(step, "update")
            forwards.step()
            profile.at(step, "agreeing")
            if world.device.type == "cuda":
                torch.cuda.synchronize()  # kernels of a step stay inside of its range
            profile.end_step(step, pauses=False)
    with gzip.open(folder / "rank0.json.gz") as file:
        trace = json.load(file)
    found = break_down(trace)
    by_kind, longest = kernels(trace)
    count = len(found.steps_s)
    lines = [
        summarise(trace),
        *(
            f"{ms / count:9.2f} ms {calls // count:6} x  {name[:120]}"
            for name, (ms, calls) in longest.items()
        ),
    ]
    return {
        "shares": {kind: round(found.of_kind(kind), 4) for kind in KINDS if found.of_kind(kind)},
        "kernels_ms": {kind: round(ms / count, 3) for kind, ms in by_kind.items()},
        "profiled_step_s": round(sum(found.steps_s.values()) / count, 4),
        "text": "\n".join(lines),
    }


def kernels(trace: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, tuple[float, int]]]:
    """Milliseconds of the GPU by kind of kernel, most first, and (milliseconds, calls) of the names that took
    longest. Both empty for a trace without a GPU."""
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ms, name = event["dur"] / 1e3, event["name"]
            by_kind[kind_of(name)] += ms
            by_name[name] = by_name[name][0] + ms, by_name[name][1] + 1
    longest = sorted(by_name, key=lambda name: -by_name[name][0])[:LONGEST]
    return dict(sorted(by_kind.items(), key=lambda item: -item[1])), {name: by_name[name] for name in longest}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KERNELS if pattern.search(kernel)), "others")
