"""Training images per second of our loader and of mmseg's `build_dataloader`: the same data set, pipeline,
batch size and number of workers, in turn.

    python benchmarks/data_loading.py [--config CONFIG] [--workers 1] [--batches 40] [--rounds 5]

Each round takes BATCHES batches of both after two that warm up. Prints images/s of every round, and ends with
a line of JSON: ratio = median of ours / median of mmseg's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from mmseg.datasets import build_dataloader

from internseg_ds.config.experiment import read_experiment
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.loading import training_batches
from internseg_ds.data.sampler import GlobalBatchSampler


def images_per_s(batches: Iterator[Any], count: int, size: int) -> float:
    for _ in range(2):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * size / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    experiment = read_experiment(args.config)
    dataset, size = (
        build_datasets(experiment.train, "data.train"),
        experiment.micro_batch,
    )

    def ours() -> float:
        with closing(
            training_batches(
                dataset,
                GlobalBatchSampler(len(dataset), size),
                workers=args.workers,
                seed=0,
                device=torch.device("cpu"),
            )
        ) as batches:
            return images_per_s(batches, args.batches, size)

    def theirs() -> float:
        loader = build_dataloader(dataset, size, args.workers, dist=False, seed=0, drop_last=True)
        assert len(loader) >= args.batches + 2, (
            f"an epoch has {len(loader)} batches; take --batches {len(loader) - 2}"
        )
        return images_per_s(iter(loader), args.batches, size)

    found: dict[str, list[float]] = {"ours": [], "mmseg": []}
    for round_ in range(args.rounds):
        for name, loader in (
            (("ours", ours), ("mmseg", theirs)) if round_ % 2 == 0 else (("mmseg", theirs), ("ours", ours))
        ):
            found[name].append(loader())
        print(
            f"round {round_}: ours {found['ours'][-1]:.1f}, mmseg {found['mmseg'][-1]:.1f} images/s",
            flush=True,
        )
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        json.dumps(
            {
                "ratio": round(medians["ours"] / medians["mmseg"], 3),
                **{f"{name}_images_per_s": round(value, 1) for name, value in medians.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
