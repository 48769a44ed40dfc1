"""One optimizer step of this project beside its alternatives: same weights, images, ds_config and dtype, in
turn, in one run.

    python benchmarks/train_step.py --size tiny --world 2 --deepspeed_config ds_configs/zero3_bf16.json \\
        --published ~/InternVL

Each contender runs in processes of its own (they register backbones of one name, and memory is to be told
apart), once per round, in another order each time. Prints per contender the median seconds per step, its
ratio to ours, the seconds that a process computed in a step (which other programs on the machine disturb
less), the peak memory of a process during the timed steps (and what of it is not the libraries), the model
FLOPs utilization (of the fastest matrix product seen in the same run), and whether its first losses are ours.
Ends with a line of JSON: ratio = ours / the best of the others.

MMEngine and timm (which the published file imports) are installed into --packages, a folder of their own, the
first time. On CPUs everything is fp32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from contenders import NAMES
from rich.console import Console
from rich.table import Table
from workload import ROOT, Workload, ds_config_of, size_of

from internseg_ds.device import device_type

PACKAGES = ("mmengine==0.10.7", "termcolor", "timm==1.0.31")
TOLERANCE = 2e-4
"""Relative difference of first losses, in fp32."""


def main() -> None:
    args = options()
    workload = workload_of(args)
    if args.size == "6b":
        check_memory(args.world, workload)
    names = [name for name in args.contenders if args.published or not name.startswith("published")]
    if not args.packages.is_dir() and set(names) - {"ours", "bare_deepspeed", "plain_timm"}:
        install(args.packages)
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        if args.size != "6b":
            workload = replace(workload, weights=write_weights(workload, Path(folder, "weights.pth")))
        measured: dict[str, list[dict]] = {name: [] for name in names}
        failed: dict[str, str] = {}
        for round_ in range(args.rounds):
            for name in [names[(index + round_) % len(names)] for index in range(len(names))]:
                if name in failed:
                    continue
                found = measure(
                    name,
                    workload,
                    args.world,
                    Path(folder),
                    packages=args.packages,
                    under=args.under,
                    timeout=args.timeout,
                )
                if "error" in found:
                    failed[name] = found["error"]
                    print(f"{name} cannot run: {found['error']}", flush=True)
                else:
                    measured[name].append(found)
                    print(
                        f"round {round_}: {name} {found['seconds']:.4f} s/step, peak "
                        f"{found['peak_bytes'] / 2**30:.3f} GiB",
                        flush=True,
                    )
    if "ours" in failed:
        sys.exit(1)
    report({name: runs for name, runs in measured.items() if runs}, failed, workload, args)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=("tiny", "300m", "dinov3", "6b"), default="tiny")
    parser.add_argument("--world", type=int, default=2, help="processes")
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", default="ds_configs/zero3_bf16.json", metavar="JSON"
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="images per process (None: 4 tiny, 2 300m and 6b; at least 2 for a batch norm of one process)",
    )
    parser.add_argument("--steps", type=int, default=15, help="timed steps per round, 2 or more")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, whose losses are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--norm-type",
        choices=("rms_norm", "layer_norm"),
        default="rms_norm",
        help="of the blocks; the published ones have RMSNorm only",
    )
    parser.add_argument(
        "--frozen", action="store_true", help="the ViT is frozen (the published freeze_vit): head tuning"
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="PATH",
        help="a clone of github.com/OpenGVLab/InternVL; without it those contenders are left out",
    )
    parser.add_argument(
        "--packages",
        type=Path,
        default=Path(tempfile.gettempdir(), "internseg_ds_contenders"),
        help="folder for MMEngine and timm",
    )
    parser.add_argument("--contenders", nargs="+", choices=NAMES, help="None: all that train this model")
    parser.add_argument(
        "--under",
        default="",
        metavar="COMMAND",
        help="what to start each contender with, such as 'numactl -N 0'",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one contender in one round")
    args = parser.parse_args()
    if args.steps < 2:  # a step's CPU seconds are those between two forward passes
        parser.error(f"--steps {args.steps} must be 2 or more")
    timm = ("ours", "plain_timm")
    able = [name for name in NAMES if (name in timm if args.size == "dinov3" else name != "plain_timm")]
    args.contenders = args.contenders or able
    if wrong := set(args.contenders) - set(able):
        parser.error(f"{', '.join(sorted(wrong))} cannot train --size {args.size}; {', '.join(able)} can")
    return (
        args
        if "ours" in args.contenders
        else parser.error("--contenders must name ours, which the others are compared to")
    )


def workload_of(args: argparse.Namespace) -> Workload:
    gpu = device_type() == "cuda"
    ds_config = ds_config_of(args.deepspeed_config, "bfloat16" if gpu else "float32")
    fields = size_of(args.size, "SyncBN" if gpu and args.world > 1 else "BN")
    fields["options"]["model.backbone.norm_type"] = args.norm_type
    if args.norm_type == "rms_norm":
        del fields["options"]["model.backbone.norm_type"]  # the published constructor does not know it
    if args.frozen:
        fields["options"]["model.backbone.freeze_vit"] = True
    if args.micro_batch:
        fields["micro_batch"] = args.micro_batch
    return Workload(
        **fields,
        ds_config=ds_config,
        steps=args.steps,
        warmup=args.warmup,
        published=str(args.published.resolve()) if args.published else None,
    )


def check_memory(world: int, workload: Workload) -> None:
    """Ends with one sentence where the training state alone has no room. Offloaded state is looked for in the
    host's memory."""
    from workload import resolved_ds_config

    from internseg_ds.distributed.construction import build_on_meta
    from internseg_ds.planning.zero_memory import model_states
    from internseg_ds.planning.zero_settings import ZeroSettings

    cfg = workload.experiment
    raw = resolved_ds_config(workload, cfg, world)
    need = {"gpu": 0, "host": 0}
    precision = "bf16" if raw.get("bf16", {}).get("enabled") else "fp32"
    settings = ZeroSettings(raw.get("zero_optimization", {}), precision, world)
    for part in model_states(build_on_meta(cfg.model), settings):
        need["gpu" if device_type() == "cuda" else "host"] += part.device
        need["host"] += part.host
    have = {
        "gpu": torch.cuda.get_device_properties(0).total_memory if device_type() == "cuda" else 0,
        "host": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world,
    }
    for place, size in need.items():
        if size > have[place]:
            sys.exit(
                f"error: the 6b size needs {size / 2**30:.0f} GiB of {place} memory per process for "
                "weights, gradients and optimizer, and there are "
                f"{have[place] / 2**30:.0f} GiB; offload with "
                "ds_configs/zero3_bf16_offload_optimizer.json, take more GPUs, or take --size 300m"
            )


def install(folder: Path) -> None:
    print(f"installing {', '.join(PACKAGES)} into {folder}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES],
        check=True,
    )


def write_weights(workload: Workload, path: Path) -> str:
    """Random weights, which every contender starts from."""
    from mmseg.models import build_segmentor

    import internseg_ds.models  # noqa: F401  which registers ours
    from internseg_ds.distributed.initial_values import initialise

    model = build_segmentor(workload.experiment.model)
    initialise(model, 0, torch.float32)
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def measure(
    name: str,
    workload: Workload,
    world: int,
    folder: Path,
    *,
    packages: Path | None = None,
    under: str = "",
    timeout: float = 600,
    threads: int | None = None,
) -> dict:
    """Runs one contender in `world` processes: what `one_contender.py` wrote, or {"error": ...}. threads: of
    each process, None for its share of the cores."""
    job, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)
    job.write_text(json.dumps(asdict(workload)))
    threads = threads or max(1, (os.cpu_count() or 1) // world)
    paths = [str(ROOT), *([str(packages)] if packages else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [
        *under.split(),
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(world),
        str(ROOT / "benchmarks/one_contender.py"),
        name,
        str(job),
        str(result),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": device_type(),
    }
    done = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, stderr = done.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        done.terminate()  # torchrun ends its processes
        done.communicate()
        return {"error": f"not done after {timeout:g} s"}
    if result.exists():
        return json.loads(result.read_text())
    return {"error": " ".join(stderr.split())[-600:]}


def report(
    measured: dict[str, list[dict]], failed: dict[str, str], workload: Workload, args: argparse.Namespace
) -> None:
    from internseg_ds.distributed.construction import build_on_meta
    from internseg_ds.planning.flops import training_pass

    flops = (
        training_pass(
            build_on_meta(workload.experiment.model), workload.image_px, workload.image_px
        ).model_flops
        * workload.micro_batch
    )
    ceiling = max(run["matmul_flops"] for runs in measured.values() for run in runs)
    seconds, cpu, peaks = (
        {name: statistics.median(run[key] for run in runs) for name, runs in measured.items()}
        for key in ("seconds", "cpu_seconds", "peak_bytes")
    )
    own = {
        name: statistics.median(run["peak_bytes"] - run["start_bytes"] for run in runs)
        for name, runs in measured.items()
    }
    table = Table(
        "contender",
        "s/step",
        "ours / it",
        "CPU s/step",
        "peak GiB",
        "not libraries",
        "MFU %",
        "first losses",
        title=f"{args.size}, {args.world} x {workload.micro_batch} images of {workload.image_px} px, "
        f"{Path(args.deepspeed_config).stem}, "
        f"matmul {ceiling / 1e12:.4g} TFLOP/s per process",
    )
    same = {}
    for name in measured:
        ours, theirs = measured["ours"][0]["losses"], measured[name][0]["losses"]
        same[name] = max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))
        table.add_row(
            name,
            f"{seconds[name]:.4f}",
            f"{seconds['ours'] / seconds[name]:.3f}",
            f"{cpu[name]:.4f}",
            f"{peaks[name] / 2**30:.3f}",
            f"{own[name] / 2**30:.3f}",
            f"{100 * flops / seconds[name] / ceiling:.1f}",
            "ours" if name == "ours" else f"differ by {same[name]:.1e}",
        )
    Console(width=140).print(table)
    fp32 = not workload.ds_config.get("bf16", {}).get("enabled")
    if workload.weights and fp32 and max(same.values()) > TOLERANCE:
        sys.exit("error: the first losses differ, so the contenders did not do the same work")
    others = [value for name, value in seconds.items() if name != "ours"]
    print(
        json.dumps(
            {
                "ratio": round(seconds["ours"] / min(others), 4) if others else None,
                "size": args.size,
                "world": args.world,
                "micro_batch": workload.micro_batch,
                "ds_config": Path(args.deepspeed_config).stem,
                "matmul_tflops": round(ceiling / 1e12, 4),
                "model_tflop_per_process": round(flops / 1e12, 4),
                "seconds": {name: round(value, 4) for name, value in seconds.items()},
                "cpu_seconds": {name: round(value, 4) for name, value in cpu.items()},
                "peak_gib": {name: round(value / 2**30, 3) for name, value in peaks.items()},
                "own_gib": {name: round(value / 2**30, 3) for name, value in own.items()},
                "mfu": {name: round(flops / value / ceiling, 4) for name, value in seconds.items()},
                "loss_difference": {name: round(value, 8) for name, value in same.items()},
                "rounds": {
                    name: [round(run["seconds"], 4) for run in runs] for name, runs in measured.items()
                },
                "failed": failed,
            }
        )
    )


if __name__ == "__main__":
    main()
