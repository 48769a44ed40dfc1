"""An update of AdamW with moments in fewer bits, its conversions compiled and not, in turn on the same numbers.

    python benchmarks/compact_update.py [--elements 4194404] [--steps 7]

For each format: whether weights and state are equal to the last bit after all steps, CPU seconds of an update
(process time, which other programs disturb less), and the ratio, compiled over uncompiled: of the medians, and
the lowest and highest of single steps. The first two steps, which compile, are left out. Ends with a line of
JSON.
"""

import argparse
import json
import math
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from internseg_ds.moment_formats import OptimizerStates
from internseg_ds.optimization.compact_adam import CompactAdam

FORMATS: list[tuple[OptimizerStates, torch.dtype]] = [
    ("bf16", torch.float32),
    ("bf16", torch.bfloat16),
    ("8bit", torch.float32),
    ("8bit", torch.bfloat16),
]


class Training:
    """One flat tensor under AdamW, with the seconds of each update."""

    def __init__(self, states: OptimizerStates, dtype: torch.dtype, elements: int, compiled: bool) -> None:
        values = torch.randn(elements, generator=torch.Generator().manual_seed(0))
        self.flat = torch.nn.Parameter(values.to(dtype))
        self.optimizer = CompactAdam(
            [{"params": [self.flat]}],
            torch.optim.AdamW,
            math.inf,
            states,
            compiled=compiled,
            lr=1e-3,
            weight_decay=0.05,
            fused=True,
        )
        self.optimizer.divide({self.flat: [(0, elements, 0)]})
        self.seconds: list[float] = []

    def step(self, gradient: torch.Tensor) -> None:
        self.flat.grad = gradient.clone()
        began = time.process_time()
        self.optimizer.step()
        self.seconds.append(time.process_time() - began)

    def equals(self, other: "Training") -> bool:
        mine, theirs = self.optimizer.state[self.flat], other.optimizer.state[other.flat]
        same_state = all(torch.equal(value, theirs[name]) for name, value in mine.items())
        return torch.equal(self.flat, other.flat) and same_state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=2**22 + 100, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="timed (default: %(default)s)")
    args = parser.parse_args()
    table = Table("moments", "weights", "equal", "uncompiled, ms", "compiled, ms", "ratio (range)")
    rows = []
    for states, dtype in FORMATS:
        plain, compiled = (Training(states, dtype, args.elements, compiled) for compiled in (False, True))
        for step in range(args.steps + 2):
            noise = torch.Generator().manual_seed(step + 1)
            gradient = torch.randn(args.elements, generator=noise).to(dtype)
            for one in (plain, compiled):
                one.step(gradient)
        before, after = (statistics.median(one.seconds[2:]) for one in (plain, compiled))
        ratios = [b / a for a, b in zip(plain.seconds[2:], compiled.seconds[2:], strict=True)]
        weights, equal = str(dtype).removeprefix("torch."), plain.equals(compiled)
        table.add_row(
            states,
            weights,
            "yes" if equal else "NO",
            f"{1000 * before:.0f}",
            f"{1000 * after:.0f}",
            f"{after / before:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )
        rows.append({"states": states, "weights": weights, "equal": equal, "ratio": after / before})
    Console(width=110).print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
