"""What turning a ZeRO-3 checkpoint into one file costs: ours, DeepSpeed's zero_to_fp32 in both its forms, and
a plain copy of as many bytes, in one run.

    python benchmarks/consolidate.py [--gib 3] [--ranks 8] [--folder DIR] [--rounds 2]

Builds a synthetic checkpoint (`--gib` of fp32 weights, and twice as much of AdamW moments, in the files of
`--ranks` processes) without a GPU, and runs each tool in a process of its own, with nothing of the files in
the system's cache: seconds, and peak resident memory over that of an interpreter that only imports torch.
Ends with a line of JSON: memory_over_zero_to_fp32 (peaks as the system counts them, imports too),
time_over_copy of the whole command, net_time_over_copy without the import of torch, and time_over_unchecked,
what holding what is read against its checksums costs, likewise.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from internseg_ds.checkpoints.manifest import SaveRecord, write_manifest

WIDTH = 3200
ROOT = Path(__file__).resolve().parent.parent


def shapes(gib: float) -> dict[str, torch.Size]:
    """Names and shapes like those of InternViT-6B's blocks, until they make `gib` GiB of fp32."""
    block = {
        "attn.qkv.weight": (3 * WIDTH, WIDTH),
        "attn.proj.weight": (WIDTH, WIDTH),
        "mlp.fc1.weight": (4 * WIDTH, WIDTH),
        "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        "norm1.weight": (WIDTH,),
        "norm2.weight": (WIDTH,),
    }
    found: dict[str, torch.Size] = {}
    number = 0
    while sum(shape.numel() for shape in found.values()) * 4 < gib * 2**30:
        found |= {f"backbone.blocks.{number}.{name}": torch.Size(shape) for name, shape in block.items()}
        number += 1
    return found


def write_checkpoint(folder: Path, gib: float, ranks: int, *, noted: bool = True) -> None:
    """The files that DeepSpeed 0.19.8 writes under ZeRO-3 in bf16, with random values. noted: with this
    engine's manifest, which has their checksums."""
    param_shapes = shapes(gib)
    share = sum(math.ceil(shape.numel() / ranks) for shape in param_shapes.values())
    save = folder / "global_step1"
    save.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    for rank in range(ranks):
        flat = torch.rand(share, generator=torch.Generator().manual_seed(rank))
        moments = {"step": torch.tensor(1.0), "exp_avg": flat, "exp_avg_sq": flat.clone()}
        torch.save(
            {
                "optimizer_state_dict": {
                    "zero_stage": 3,
                    "partition_count": ranks,
                    "fp32_flat_groups": [flat.clone()],
                    "optimizer_state_dict": {"state": {0: moments}, "param_groups": [{"lr": 1e-4}]},
                },
                "ds_version": "0.19.8",
            },
            save / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        torch.save(
            {
                "module": {},
                "buffer_names": [],
                "param_shapes": [param_shapes],
                "frozen_param_shapes": {},
                "frozen_param_fragments": {},
                "shared_params": {},
                "global_steps": 1,
                "ds_version": "0.19.8",
            },
            save / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
        print(f"wrote rank {rank}", flush=True)
    if noted:
        write_manifest(save, SaveRecord(step=1, world_size=ranks, zero_stage=3))


# a process starts with the peak of the one that forked it (Linux keeps it over exec), so a small one stands
# in between
SMALL = """import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([code, time.perf_counter() - began, peak]))"""


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak resident bytes of a command."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", SMALL, *command], capture_output=True, text=True, cwd=ROOT
    )
    code, seconds, peak = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, peak


def forget(folder: Path) -> None:
    """Takes the files below a folder out of the system's cache, so that every tool reads from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/consolidate.py --gib 3 --ranks 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gib", type=float, default=3.0, help="GiB of fp32 weights (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="processes that saved it (default: %(default)s)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work (default: the system's temporary folder); needs 5 times --gib",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=2,
        help="measurements of each tool, in turn; the median time counts (default: %(default)s)",
    )
    args = parser.parse_args()
    python, zero_to_fp32 = sys.executable, [sys.executable, "-m", "deepspeed.utils.zero_to_fp32"]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        write_checkpoint(work / "checkpoints", args.gib, args.ranks)
        source, out = str(work / "checkpoints"), work / "out"
        size = 4 * sum(shape.numel() for shape in shapes(args.gib).values())
        copied = work / "copied"
        with copied.open("wb") as file:
            for _ in range(size // 2**26):
                file.write(os.urandom(2**26))
        tools = {
            "import torch": [python, "-c", "import torch"],
            "plain copy": [
                python,
                "-c",
                f"import shutil, os; shutil.copyfile({str(copied)!r}, {str(out)!r}); "
                f"os.fsync(os.open({str(out)!r}, os.O_RDONLY))",
            ],
            "ours, .pth": [python, "launch/consolidate.py", source, f"{out}.pth"],
            "ours, unchecked .pth": [
                python,
                "launch/consolidate.py",
                source,
                f"{out}.pth",
                "--skip-checksums",
            ],
            "ours, .safetensors": [python, "launch/consolidate.py", source, f"{out}.safetensors"],
            "ours, sharded": [python, "launch/consolidate.py", source, f"{out}_sharded"],
            "zero_to_fp32, one file": [
                *zero_to_fp32,
                source,
                f"{out}_one",
                "--max_shard_size",
                "1000GB",
                "--safe_serialization",
            ],
            "zero_to_fp32, sharded": [*zero_to_fp32, source, f"{out}_shards", "--safe_serialization"],
        }
        seconds: dict[str, list[float]] = {tool: [] for tool in tools}
        peak: dict[str, int] = dict.fromkeys(tools, 0)
        for _ in range(args.rounds):
            for tool, command in tools.items():
                forget(work)
                took, resident = measure(command)
                seconds[tool].append(took)
                peak[tool] = max(peak[tool], resident)
                for rest in work.glob("out*"):
                    shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
    time_of = {tool: statistics.median(values) for tool, values in seconds.items()}
    print(f"{'':24} {'seconds':>9} {'peak MiB':>9} {'over import torch':>18}")
    for tool in tools:
        print(
            f"{tool:24} {time_of[tool]:9.2f} {peak[tool] / 2**20:9.0f} "
            f"{(peak[tool] - peak['import torch']) / 2**20:18.0f}"
        )
    ours, theirs = (
        max(peak[tool] for tool in tools if tool.startswith(who)) for who in ("ours", "zero_to_fp32")
    )
    whole, copy, start = time_of["ours, .pth"], time_of["plain copy"], time_of["import torch"]
    print(
        json.dumps(
            {
                "memory_over_zero_to_fp32": round(ours / theirs, 4),
                "time_over_copy": round(whole / copy, 4),
                "net_time_over_copy": round((whole - start) / copy, 4),
                "time_over_unchecked": round((whole - start) / (time_of["ours, unchecked .pth"] - start), 4),
                "gib": args.gib,
                "ranks": args.ranks,
            }
        )
    )


if __name__ == "__main__":
    main()
