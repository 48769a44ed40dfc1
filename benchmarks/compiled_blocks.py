"""What `engine.compile` costs and saves: backbones with compiled and with uncompiled blocks, side by side in one run.

    python benchmarks/compiled_blocks.py
    python benchmarks/compiled_blocks.py --models intern_vit --width 768 --size 224 --rounds 7

Per backbone: seconds that the first step takes longer than an uncompiled one (forward and backward of each kind of
block are compiled in it), the time of a forward and backward pass compiled over uncompiled (median and range of
rounds in which both run in turn), the same of CPU time, the activations that a forward pass keeps, the difference of
the losses, and how many graphs there are. One process, without DeepSpeed, random images and weights; bf16 on GPUs,
fp32 on CPUs unless --dtype says otherwise. Caches of earlier runs are not used. Ends with a line of JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

POLICIES = ("none", "blocks", "all_but_matmuls")
IMAGES = 2


def main() -> None:
    args = options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="compiled_blocks_") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in args.models:
            row = measure(name, args, device, dtype)
            rows.append(row)
            print(
                f"{name}, recomputation {args.recomputation}: {row['graphs']} graphs, compiled in "
                f"{row['compile_s']} s; {row['eager_ms']} ms uncompiled, {row['compiled_ms']} compiled, ratio "
                f"{row['ratio']} ({row['ratio_least']} to {row['ratio_most']}), of CPU time {row['cpu_ratio']} "
                f"({row['cpu_ratio_least']} to {row['cpu_ratio_most']}); kept {row['eager_kept_mib']} and "
                f"{row['compiled_kept_mib']} MiB",
                flush=True,
            )
    print(
        json.dumps(
            {
                "benchmark": "compiled_blocks",
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "dtype": str(dtype).removeprefix("torch."),
                "recomputation": args.recomputation,
                "width": args.width,
                "depth": args.depth,
                "size": args.size,
                "rows": rows,
            }
        )
    )


def measure(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    from internseg_ds.models.block_execution.compiled_blocks import compile_blocks
    from internseg_ds.models.repeated_blocks import block_names

    eager, compiled = (backbone(name, args, device, dtype) for _ in range(2))
    compile_blocks(compiled, block_names(compiled))
    torch.manual_seed(1)
    images = torch.randn(IMAGES, 3, args.size, args.size, device=device, dtype=dtype)
    runs = [stepper(model, images, device) for model in (eager, compiled)]
    graphs = counters["stats"]["unique_graphs"]
    first = [timed(run) for run in runs]
    warm = [timed(run) for run in runs]
    graphs = counters["stats"]["unique_graphs"] - graphs
    rounds = [[timed(run) for run in runs] for _ in range(args.rounds)]
    ratios = [after.seconds / before.seconds for before, after in rounds]
    cpu_ratios = [after.cpu_seconds / before.cpu_seconds for before, after in rounds]
    return {
        "model": name,
        "graphs": graphs,
        "compile_s": round(first[1].seconds - warm[0].seconds, 1),
        "eager_ms": round(1e3 * statistics.median(before.seconds for before, _ in rounds), 1),
        "compiled_ms": round(1e3 * statistics.median(after.seconds for _, after in rounds), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "cpu_ratio_least": round(min(cpu_ratios), 3),
        "cpu_ratio_most": round(max(cpu_ratios), 3),
        "eager_kept_mib": round(kept_bytes(eager, images) / 2**20, 1),
        "compiled_kept_mib": round(kept_bytes(compiled, images) / 2**20, 1),
        "loss_difference": abs(warm[0].loss - warm[1].loss) / abs(warm[0].loss),
    }


def backbone(name: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from mmseg.models import build_backbone

    import internseg_ds.models  # noqa: F401 - registers the backbones
    from internseg_ds.models.activation_checkpointing import set_recomputation
    from internseg_ds.torch_internals import reset_parameters_of

    heads = args.width // 64
    configs: dict[str, dict[str, Any]] = {
        "intern_vit": dict(
            type="InternViT6B",
            embed_dim=args.width,
            num_heads=heads,
            depth=args.depth,
            img_size=args.size,
            out_indices=[args.depth - 1],
            drop_path_rate=0.1,
        ),
        "intern_image": dict(
            type="InternImage",
            channels=args.width // 8,
            depths=[2, 2, args.depth, 2],
            groups=[heads, heads, 2 * heads, 4 * heads],
            drop_path_rate=0.1,
        ),
        "timm": dict(
            type="TimmBackbone",
            model_name="vit_small_patch16_dinov3",
            model_args=dict(embed_dim=args.width, depth=args.depth, num_heads=heads),
            drop_path_rate=0.1,
        ),
    }
    torch.manual_seed(0)
    made = build_backbone(configs[name])
    for module in made.modules():
        if (reset := reset_parameters_of(module)) is not None:
            reset()
    set_recomputation(made, args.recomputation)
    return made.to(device, dtype).train()


def stepper(model: nn.Module, images: Tensor, device: torch.device) -> Callable[[], float]:
    """A forward and a backward pass, which returns the loss, always with the same random numbers."""

    def run() -> float:
        model.zero_grad()
        torch.manual_seed(2)
        loss = sum(features.float().square().mean() for features in model(images))
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    return run


class Timed(NamedTuple):
    """Of one pass. cpu_seconds: of this process's work, which other programs on the machine disturb less."""

    seconds: float
    cpu_seconds: float
    loss: float


def timed(run: Callable[[], float]) -> Timed:
    began, cpu_began = time.perf_counter(), time.process_time()
    loss = run()
    return Timed(time.perf_counter() - began, time.process_time() - cpu_began, loss)


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Of all storages but the parameters' that autograd keeps of a forward pass."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ("intern_vit", "intern_image", "timm")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--width", type=int, default=384, help="channels of a token, a multiple of 64")
    parser.add_argument("--depth", type=int, default=6, help="blocks; InternImage's in its third level")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recomputation", choices=POLICIES, default="none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
