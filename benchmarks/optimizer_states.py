"""What moments in bf16 and 8 bits, and weights in bf16 alone, do to a training: the same tiny model under
each.

    python benchmarks/optimizer_states.py --steps 300 --seeds 3

First, on random numbers: of weights as a large backbone has them (a normal distribution of --std), the share
that one step of AdamW leaves as they were, and how far those after 100 steps are from where fp64 takes them,
by what holds them: fp32; bf16, rounded to the nearest; bf16, rounded stochastically, as
`engine.optimizer_states` has it; bf16 with a second bf16 number for what was rounded off (Kahan). Then a
small classifier, by our optimizer without DeepSpeed, with 5 seeds. Then trainings on generated scenes, with
--seeds seeds in fp32 and --other-seeds in each other format, which decide initial values and order of data:
loss (mean of the last tenth of the steps) and mIoU after the last step. A stand-in: it shows whether a format
loses anything that the spread over seeds does not hide, and says nothing of published backbones. Ends with a
line of JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
import whole_runs
from mmcv import Config
from rich.console import Console
from rich.table import Table
from torch import Tensor

from internseg_ds.moment_formats import rounded_to_bf16
from internseg_ds.optimization.compact_adam import CompactAdam

ROOT = Path(__file__).resolve().parent.parent
SCENES = ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
BATCH = 4
BF16 = {"enabled": True}
BF16_WEIGHTS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
KINDS: dict[str, tuple[str, dict[str, bool], int]] = {
    "fp32 weights, fp32 moments": ("fp32", BF16, 16),
    "fp32 weights, bf16 moments": ("bf16", BF16, 12),
    "fp32 weights, 8-bit moments": ("8bit", BF16, 10),
    "bf16 weights, bf16 moments": ("bf16", BF16_WEIGHTS, 10),
    "bf16 weights, 8-bit moments": ("8bit", BF16_WEIGHTS, 8),
}
"""engine.optimizer_states, the bf16 section of the ds_config, and bytes per parameter with weight and
gradient."""
ELEMENTS = 1_000_000
UPDATES = 100


def main() -> None:
    args = options()
    held = by_format(args.lr, args.std)
    print_formats(held, args)
    small = {kind: [classifier(kind, seed) for seed in range(5)] for kind in (*KINDS, "nearest")}
    print_classifiers(small)
    found: dict[str, dict[str, list[float]]] = {kind: {"loss": [], "mIoU": []} for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="optimizer_states_") as name:
        folder = Path(name)
        write_scenes(folder / "scenes", args.scenes)
        for seed in range(max(args.seeds, args.other_seeds)):
            for kind, (states, *_) in KINDS.items():
                if seed >= (args.seeds if states == "fp32" else args.other_seeds):
                    continue
                result = train(kind, seed, folder, args)
                for what, value in result.items():
                    found[kind][what].append(value)
                print(
                    f"{kind}, seed {seed}: loss {result['loss']:.4f}, mIoU {result['mIoU']:.2f}", flush=True
                )
    print_trainings(found, args)
    print(
        json.dumps(
            {
                "steps": args.steps,
                "width": args.width,
                "lr": args.lr,
                "formats": held,
                "classifiers": small,
                "trainings": found,
            }
        )
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="of a training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="in fp32 (default: %(default)s)")
    parser.add_argument("--other-seeds", type=int, default=3, help="of other formats (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="of the backbone (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=100, help="training images (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-5, help="of the random numbers (default: %(default)s)")
    parser.add_argument(
        "--std", type=float, default=0.02, help="of the weights among them (default: %(default)s)"
    )
    return parser.parse_args()


# ---- random numbers


class Held:
    """Weights in one format, to which updates (fp32) are added. `values`: what they are, in fp64."""

    def __init__(self, kind: str, start: Tensor) -> None:
        """kind: "fp32", "nearest", "stochastic" or "kahan". start: is bf16 already."""
        self.kind = kind
        self.weights = start.float() if kind == "fp32" else start.bfloat16()
        self.lost = torch.zeros_like(self.weights)
        self.noise = torch.Generator().manual_seed(0)

    @property
    def values(self) -> Tensor:
        return self.weights.double() + self.lost.double()

    def add(self, update: Tensor) -> None:
        if self.kind == "fp32":
            self.weights += update
        elif self.kind == "kahan":
            wanted = update + self.lost.float()
            after = (self.weights.float() + wanted).bfloat16()
            self.lost = (wanted - (after.float() - self.weights.float())).bfloat16()
            self.weights = after
        else:
            noise = self.noise if self.kind == "stochastic" else None
            self.weights = rounded_to_bf16(self.weights.float() + update, noise)


def by_format(lr: float, std: float) -> dict[str, dict[str, float]]:
    """Of each format, in percent: weights that the first step leaves as they were ("unchanged"), and after
    `UPDATES` steps of AdamW with gradients that are half signal, half noise, the distance from the weights in
    fp64 over the length of the way ("off")."""
    generator = torch.Generator().manual_seed(0)
    start = (std * torch.randn(ELEMENTS, generator=generator)).bfloat16()
    signal = torch.randn(ELEMENTS, generator=generator)
    exact = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([exact], lr=lr, betas=(0.9, 0.999), weight_decay=0.05)
    held = {kind: Held(kind, start) for kind in ("fp32", "nearest", "stochastic", "kahan")}
    unchanged: dict[str, float] = {}
    for step in range(UPDATES):
        before = exact.detach().clone()
        exact.grad = (signal + torch.randn(ELEMENTS, generator=generator)).double()
        optimizer.step()
        for kind, each in held.items():
            each.add((exact.detach() - before).float())
            if not step:
                unchanged[kind] = 100 * (each.values == start.double()).double().mean().item()
    way = exact.detach() - start.double()
    return {
        kind: {
            "unchanged": unchanged[kind],
            "off": 100 * ((each.values - exact.detach()).norm() / way.norm()).item(),
        }
        for kind, each in held.items()
    }


# ---- a small classifier, by our optimizer without DeepSpeed

SIZES = (32, 64, 64, 10)
CLASSIFIER_STEPS = 1500
CLASSIFIER_LR = 1e-3


def classifier(kind: str, seed: int) -> float:
    """Loss on fresh samples after a training of a network of fully connected layers on the classes of another
    one, with a learning rate that falls to zero. It computes with bf16 copies of the weights, and gradients
    are rounded to bf16, as under ZeRO. kind: of `KINDS`, or "nearest": weights in bf16, rounded to the
    nearest."""
    generator = torch.Generator().manual_seed(seed)
    shapes = list(pairwise(SIZES))
    teacher, start = (
        torch.cat([torch.randn(a * b, generator=generator) / a**0.5 for a, b in shapes]) for _ in range(2)
    )
    states, section, _ = KINDS.get(kind, ("fp32", BF16, 0))
    in_bf16 = section is BF16_WEIGHTS
    flat = torch.nn.Parameter(start.bfloat16() if in_bf16 else start.bfloat16().float())
    arguments = {"lr": CLASSIFIER_LR, "weight_decay": 0.05}
    if states == "fp32":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([flat], **arguments)
        rates = optimizer.param_groups
    else:
        compact = CompactAdam([{"params": [flat]}], torch.optim.AdamW, math.inf, states, **arguments)
        compact.divide({flat: [(0, flat.numel(), 0)]})
        optimizer, rates = compact, compact.settings.param_groups

    def logits(weights: Tensor, x: Tensor) -> Tensor:
        for layer, (part, shape) in enumerate(
            zip(weights.split([a * b for a, b in shapes]), shapes, strict=True)
        ):
            x = (x.relu() if layer else x) @ part.view(shape)
        return x

    def loss_of(weights: Tensor, count: int) -> Tensor:
        x = torch.randn(count, SIZES[0], generator=generator)
        return torch.nn.functional.cross_entropy(logits(weights, x), logits(teacher, x).argmax(1))

    for step in range(CLASSIFIER_STEPS):
        for group in rates:
            group["lr"] = CLASSIFIER_LR * (1 - step / CLASSIFIER_STEPS)
        copy = flat.detach().bfloat16().float().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(copy, 64), copy)
        flat.grad = gradient.bfloat16().to(flat.dtype)
        optimizer.step()
        if kind == "nearest":
            flat.data = flat.data.bfloat16().float()
    generator.manual_seed(1000)
    return loss_of(flat.detach().bfloat16().float(), 20_000).item()


def print_classifiers(found: dict[str, list[float]]) -> None:
    title = f"a small classifier, {CLASSIFIER_STEPS} steps, mean of seeds (lowest to highest)"
    table = Table("weights and moments", "loss", title=title)
    for kind, losses in found.items():
        table.add_row(kind, f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})")
    Console().print(table)


# ---- trainings


def write_scenes(folder: Path, count: int) -> None:
    """The generated data set in ADE20K's layout."""
    from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k

    write_generated_ade20k(folder, training=count, validation=32)


def experiment(kind: str, scenes: Path, steps: int, width: int) -> Config:
    cfg = Config.fromfile(SCENES)
    cfg.model.backbone.update(embed_dim=width, num_heads=width // 32)
    cfg.model.decode_head.update(in_channels=[width] * 4, channels=width // 2)
    cfg.model.auxiliary_head.update(in_channels=width, channels=width // 2)
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(scenes)
    cfg.engine.optimizer_states = KINDS[kind][0]
    cfg.engine.peak_tflops = 1.0  # not measured: nobody asks for a utilization here
    cfg.runner.max_iters = steps
    cfg.lr_config.warmup_iters = min(20, steps // 2)
    cfg.evaluation = dict(interval=steps, metric="mIoU")
    cfg.checkpoint_config = dict(by_epoch=False, interval=0)
    cfg.log_config = dict(interval=1, hooks=[dict(type="TextLoggerHook", by_epoch=False)])
    cfg.data.samples_per_gpu = cfg.engine.global_batch = BATCH
    return cfg


def train(kind: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Loss and mIoU of a training in a process of its own, under ZeRO-2."""
    work_dir = folder / f"{list(KINDS).index(kind)}_{seed}"
    cfg = experiment(kind, folder / "scenes", args.steps, args.width)
    ds_config = {"bf16": KINDS[kind][1], "zero_optimization": {"stage": 2}}
    records = whole_runs.train(cfg, ds_config, work_dir, "--seed", seed)
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "loss": statistics.mean(losses[-max(1, args.steps // 10) :]),
        "mIoU": next(record["mIoU"] for record in reversed(records) if "mIoU" in record),
    }


# ---- tables


def print_formats(held: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    table = Table(
        "weights held in",
        "unchanged by a step, %",
        f"off after {UPDATES} steps, %",
        title=f"lr {args.lr:g}, weights of std {args.std:g}",
    )
    for kind, row in held.items():
        table.add_row(kind, f"{row['unchanged']:.1f}", f"{row['off']:.2f}")
    Console().print(table)


def print_trainings(found: dict[str, dict[str, list[float]]], args: argparse.Namespace) -> None:
    table = Table(
        "weights and moments",
        "bytes",
        "loss",
        "mIoU",
        title=f"{args.steps} steps, mean of seeds (lowest to highest)",
    )
    for kind, values in found.items():
        table.add_row(
            kind,
            str(KINDS[kind][2]),
            *(
                f"{statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})"
                for each in values.values()
            ),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
