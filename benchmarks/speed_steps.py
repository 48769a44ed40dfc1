"""What each switch that should make a training step faster does: the same real engine with and without it, in
turn, in one run.

    deepspeed --num_gpus 2 benchmarks/speed_steps.py [SWITCH ...] [--config CONFIG] [--deepspeed_config JSON] \\
        [--model tiny|small|100m|deep] [--rounds 5]

Each variant is a `SegmentorEngine` of its own; all of them are built first, and then take STEPS steps each on
the same images, round after round, in an order that turns. Prints seconds per step (median of the rounds'
means) and bytes that a micro-batch keeps for its backward pass, and ends with a line of JSON: ratio = a
variant's seconds over those of the first variant of its switch. docs/performance.md says what came of it.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import in_turn, train_step
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from internseg_ds import SegmentorEngine
from internseg_ds.cli import command_line
from internseg_ds.data.loading import Batch

WIDTHS = {
    "tiny": {},
    "small": {
        "model.backbone.embed_dim": 384,
        "model.backbone.num_heads": 6,
        "model.backbone.depth": 12,
        "model.backbone.out_indices": [2, 5, 8, 11],
    },
    "100m": {
        "model.backbone.embed_dim": 768,
        "model.backbone.num_heads": 12,
        "model.backbone.depth": 12,
        "model.backbone.out_indices": [2, 5, 8, 11],
    },
    "deep": {
        "model.backbone.embed_dim": 64,
        "model.backbone.num_heads": 2,
        "model.backbone.depth": 48,
        "model.backbone.out_indices": [11, 23, 35, 47],
    },
}
"""The demo's model, made larger; "deep" has the 48 blocks of the 6 B model and hardly any work in them, so
that what remains is Python's."""
BLOCK = "internseg_ds.models.intern_vit.intern_vit_6b.Block"
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "recomputation": {
        name: {"engine.recomputation": value}
        for name, value in {
            "blocks": "blocks",
            "every 2nd": 2,
            "all_but_matmuls": "all_but_matmuls",
            "none": "none",
        }.items()
    },
    "zero3": {  # for ZeRO-3 ds_configs
        "hooks on layers": {"zero": {"leaf_module": {"classes": []}}},
        "hooks on blocks": {"zero": {"leaf_module": {"classes": [BLOCK]}}},
    },
    "heads_dtype": {name: {"engine.heads_dtype": name} for name in ("float32", "bfloat16")},
    "fused": {
        name: {"optimizer.fused": fused} for name, fused in {"AdamW": False, "fused AdamW": True}.items()
    },
}
"""switch -> variant -> its options; those under "zero" belong to the ds_config's zero_optimization."""


def engine_of(variant: dict[str, Any], args: Any, folder: Path) -> SegmentorEngine:
    width = WIDTHS[args.model]
    channels = width.get("model.backbone.embed_dim", 128)
    depth = width.get("model.backbone.depth", 4)
    options = {
        **width,
        "model.decode_head.in_channels": [channels] * 4,
        "model.auxiliary_head.in_channels": channels,
        "data.workers_per_gpu": 0,
        "optimizer.paramwise_cfg": {"num_layers": depth, "layer_decay_rate": 0.95},
        "data.samples_per_gpu": args.images,
        "engine.global_batch": args.images * int(os.environ.get("WORLD_SIZE", "1")),
    }
    ds = json.loads(Path(args.deepspeed_config).read_text())
    ds["zero_optimization"] |= variant.get("zero", {})
    return SegmentorEngine(
        args.config,
        ds,
        work_dir=folder,
        validate=False,
        cfg_options=options | {key: value for key, value in variant.items() if key != "zero"},
    )


class Kept(TorchDispatchMode):
    """Bytes of the storages that operations make inside a `with` block and that are still there when they are
    asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.made[tensor.untyped_storage()._cdata] = (
                    StorageWeakRef(tensor.untyped_storage()),
                    tensor.untyped_storage().nbytes(),
                )
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


def images(args: Any, engine: SegmentorEngine) -> Batch:
    size = engine.plan.experiment.model.backbone.img_size
    generator = torch.Generator().manual_seed(engine.world.rank)
    meta = {
        "filename": "",
        "ori_shape": (size, size, 3),
        "img_shape": (size, size, 3),
        "pad_shape": (size, size, 3),
    }
    return Batch(
        {
            "img": torch.randn(args.images, 3, size, size, generator=generator).to(engine.world.device),
            "gt_semantic_seg": torch.randint(0, 150, (args.images, 1, size, size), generator=generator).to(
                engine.world.device
            ),
            "img_metas": [meta] * args.images,
        },
        position=0,
    )


def finish(engine: SegmentorEngine) -> None:
    if engine.world.device.type == "cuda":
        torch.cuda.synchronize()
    torch.distributed.barrier()


def main() -> None:
    parser = command_line.parser(__doc__.splitlines()[0], "deepspeed --num_gpus 2 benchmarks/speed_steps.py")
    parser.add_argument(
        "switches", nargs="*", default=list(SWITCHES), metavar="SWITCH", help=", ".join(SWITCHES)
    )
    parser.add_argument("--config", default="configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--model", choices=WIDTHS, default="tiny")
    parser.add_argument("--images", type=int, default=2, help="per process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="per round and variant")
    args = parser.parse_args()
    # one for all ranks
    folder = Path(tempfile.gettempdir(), f"speed_steps_{os.environ.get('MASTER_PORT', 'alone')}")
    found: dict[str, Any] = {}
    owner = None
    for switch in args.switches:
        variants = SWITCHES[switch]
        engines = {
            name: engine_of(variant, args, folder / str(index))
            for index, (name, variant) in enumerate(variants.items())
        }
        owner = owner or next(iter(engines.values()))
        batch, times, kept = images(args, owner), {name: [] for name in variants}, {}
        for name, engine in engines.items():
            engine.deepspeed.train()
            for _ in range(3):  # ZeRO-3 looks on in the first and records the second
                train_step(engine, batch)
            with Kept() as counter:
                loss = engine.forward(batch)["loss"]
            kept[name] = counter.bytes()
            engine.deepspeed.backward(loss)
            engine.deepspeed.step()
        names = list(variants)
        for name in in_turn(names, args.rounds):
            finish(owner)
            began = time.perf_counter()
            for _ in range(args.steps):
                train_step(engines[name], batch)
            finish(owner)
            times[name].append((time.perf_counter() - began) / args.steps)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        first = seconds[names[0]]
        if owner.world.is_main:
            for name in names:
                print(
                    f"{switch}: {name:24} {seconds[name]:8.4f} s/step (rounds {min(times[name]):.4f} to "
                    f"{max(times[name]):.4f})  "
                    f"ratio {seconds[name] / first:.3f}  kept {kept[name] / 2**20:8.1f} MiB",
                    flush=True,
                )
        found[switch] = {
            name: {
                "s": round(seconds[name], 5),
                "ratio": round(seconds[name] / first, 4),
                "kept_mib": round(kept[name] / 2**20, 2),
            }
            for name in names
        }
        for engine in reversed(engines.values()):  # each gives signals back to the one before it
            if engine is not owner:
                engine.close()
    if owner.world.is_main:
        print(
            json.dumps(
                {
                    "model": args.model,
                    "deepspeed_config": args.deepspeed_config,
                    "processes": owner.world.size,
                    "ratio": found,
                }
            )
        )
    owner.close()


if __name__ == "__main__":
    command_line.run(main)
