"""What checksums cost: a save with and without them, and the opening of that save for a resume, in turn, in
one run.

    python benchmarks/checksums.py [--million 100] [--ranks 2] [--rounds 5] [--folder DIR]

Saves an engine of so many million parameters (ZeRO-2, 12 bytes each of optimizer state) from so many
processes until it is on disk, and opens the save as a resume does: all ranks agree on it, and each reads its
masters and moments; from the disk, with nothing of it in the system's cache, and from the cache. Ends with a
line of JSON: median times with checksums over those without. (Consolidation with checksums over a plain copy:
benchmarks/consolidate.py.)
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from consolidate import forget

from internseg_ds.checkpoints.checksums import Written
from internseg_ds.distributed.checkpoint_engine import NotingCheckpointEngine
from internseg_ds.distributed.process_group import join, leave, world_from_environment
from internseg_ds.distributed.zero_internals import fragment_of
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.resume.find_checkpoint import agree_to_resume
from internseg_ds.training.train_state import TrainState


class Plain(NotingCheckpointEngine):
    """Writes what the other one writes, and makes no checksums."""

    def _write(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self.written[os.path.basename(path)] = Written(os.path.getsize(path), "")


def seconds(run: Callable[[], object]) -> float:
    """Until all ranks are done."""
    dist.barrier()
    began = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - began


def measure(million: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(million)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
    )[0]
    engine.backward(engine(torch.randn(1, 1000, dtype=torch.bfloat16, device=engine.device)).float().sum())
    engine.step()  # AdamW has its moments now
    checkpoints = Checkpointer(folder, keep=1)

    def save() -> None:
        checkpoints.save(engine, TrainState(step=1), {})
        checkpoints.finish()

    def resume(check: bool) -> None:
        checkpoint = agree_to_resume(folder / "iter_1", 2, check=check)
        for name, param in engine.module.named_parameters():
            if fragment := fragment_of(engine, param):
                for what in ("fp32", "exp_avg", "exp_avg_sq"):
                    checkpoint.read_slice(name, fragment.start, fragment.stop, what)

    taken: dict[str, list[float]] = {}
    for number in range(rounds):
        for kind, writer in sorted(
            (("plain", Plain), ("summed", NotingCheckpointEngine)), reverse=number % 2 == 1
        ):
            engine.checkpoint_engine = writer(engine._config)
            taken.setdefault(f"save, {kind}", []).append(seconds(save))
        if number % 2:  # the one that was saved last has none
            engine.checkpoint_engine = NotingCheckpointEngine(engine._config)
            save()
        for check in (number % 2 == 0, number % 2 == 1):
            for where in ("disk", "cache"):
                if where == "disk" and dist.get_rank() == 0:
                    forget(folder)
                kind = "summed" if check else "plain"
                taken.setdefault(f"resume from the {where}, {kind}", []).append(
                    seconds(lambda check=check: resume(check))
                )
    return taken


def rank(number: int, port: int, args: argparse.Namespace, folder: str) -> None:
    os.environ.update(
        RANK=str(number),
        WORLD_SIZE=str(args.ranks),
        LOCAL_RANK=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    join(world_from_environment())
    taken = measure(args.million, args.rounds, Path(folder) / "checkpoints")
    dist.barrier()
    leave()
    if number:
        return
    median = {what: statistics.median(values) for what, values in taken.items()}
    for what, value in sorted(median.items()):
        print(f"{what:30} {value:7.2f} s   (of {', '.join(f'{each:.2f}' for each in taken[what])})")
    ratios = {
        what.replace(" ", "_"): round(median[f"{what}, summed"] / median[f"{what}, plain"], 4)
        for what in ("save", "resume from the disk", "resume from the cache")
    }
    print(json.dumps({**ratios, "million": args.million, "ranks": args.ranks}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/checksums.py --million 50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--million", type=int, default=100, help="parameters in millions (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each, in turn (default: %(default)s)"
    )
    parser.add_argument("--folder", help="where to save (default: the system's temporary folder)")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        mp.spawn(rank, (port, args, folder), nprocs=args.ranks)


if __name__ == "__main__":
    main()
