"""What loading pretrained weights costs on 1, 2 and 4 ranks: ours, where each rank of ZeRO-3 reads its share,
and torch.load + load_state_dict in every rank.

    python benchmarks/load_pretrained.py [--depth 24] [--width 1024] [--ranks 1 2 4] [--rounds 3]
    python benchmarks/load_pretrained.py --timm vit_huge_plus_patch16_dinov3 --ranks 2

The backbone is an InternViT of 300 M parameters by default, or a model of timm, in fp32 in one .pth. Prints, for
each number of ranks, the seconds that loading took on the slowest rank and by how much it raised the peak resident
memory of a rank above that of the built model. Ends with a line of JSON: ratio = our seconds over theirs at the largest
number of ranks, memory = the same of peaks.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def model_config(width: int, depth: int, timm: str | None) -> dict:
    if timm:
        backbone = dict(type="TimmBackbone", model_name=timm)
        head = dict(type="FCNHead", in_channels=1, channels=1, num_convs=0, concat_input=False, num_classes=2)
        return dict(type="EncoderDecoder", backbone=backbone, decode_head=head, test_cfg=dict(mode="whole"))
    backbone = dict(
        type="InternViT6B",
        embed_dim=width,
        depth=depth,
        num_heads=width // 64,
        img_size=224,
        out_indices=[depth - 1],
        use_flash_attn=False,
    )
    head = dict(
        type="FCNHead",
        in_channels=width,
        channels=width,
        num_convs=0,
        concat_input=False,
        num_classes=2,
        in_index=0,
    )
    return dict(type="EncoderDecoder", backbone=backbone, decode_head=head, test_cfg=dict(mode="whole"))


def one_rank(how: str, path: Path, config: dict) -> None:
    """Builds the model, loads the weights, and prints seconds and growth of the peak in bytes."""
    import torch
    import torch.distributed as dist
    from mmcv import ConfigDict

    from internseg_ds.checkpoints.weights import open_weights
    from internseg_ds.config.ds_config import resolve_ds_config
    from internseg_ds.distributed.construction import build_for_training
    from internseg_ds.distributed.process_group import join, leave, world_from_environment
    from internseg_ds.distributed.weight_loading import load, match_backbone

    world = world_from_environment()
    join(world)
    torch.set_num_threads(1)
    raw = {"zero_optimization": {"stage": 3 if how == "ours" else 1}}
    ds = resolve_ds_config(
        raw, experiment="", micro_batch=1, world_size=world.size, optimizer={"type": "AdamW", "lr": 1.0}
    )
    model = build_for_training(ConfigDict(config), ds, torch.device("cpu"), seed=0)
    dist.barrier()
    before, began = peak(), time.perf_counter()
    if how == "ours":
        load(model, match_backbone(model, open_weights(path)))
    else:
        published = getattr(model.backbone, "model", model.backbone)
        published.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    seconds, grown = time.perf_counter() - began, peak() - before
    found: list[tuple[float, int]] = [(0.0, 0)] * world.size
    dist.all_gather_object(found, (seconds, grown))
    if world.is_main:
        print(
            json.dumps({"seconds": max(each[0] for each in found), "bytes": max(each[1] for each in found)})
        )
    dist.barrier()
    leave()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(how: str, path: Path, ranks: int, args: argparse.Namespace) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        __file__,
        "--role",
        how,
        "--file",
        str(path),
        "--width",
        str(args.width),
        "--depth",
        str(args.depth),
        *(["--timm", args.timm] if args.timm else []),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/load_pretrained.py --ranks 1 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--timm", metavar="MODEL", help="of timm's, in place of an InternViT")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", choices=("ours", "torch.load"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        one_rank(args.role, args.file, model_config(args.width, args.depth, args.timm))
        return
    import torch
    from mmcv import ConfigDict
    from mmseg.models import build_backbone

    import internseg_ds.models  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        backbone = build_backbone(ConfigDict(model_config(args.width, args.depth, args.timm)["backbone"]))
        torch.save(getattr(backbone, "model", backbone).state_dict(), path)
        print(
            f"{sum(p.numel() for p in backbone.parameters()):,} parameters, "
            f"{path.stat().st_size / 2**30:.2f} GiB"
        )
        del backbone
        ratios = {}
        for ranks in args.ranks:
            runs = {
                how: [measure(how, path, ranks, args) for _ in range(args.rounds)]
                for how in ("ours", "torch.load")
            }
            median = {
                how: {key: statistics.median(run[key] for run in each) for key in ("seconds", "bytes")}
                for how, each in runs.items()
            }
            for how, each in median.items():
                print(
                    f"{ranks} ranks, {how:11} {each['seconds']:7.2f} s  peak of a rank "
                    f"+{each['bytes'] / 2**20:6.0f} MiB",
                    flush=True,
                )
            ratios = {
                "ratio": round(median["ours"]["seconds"] / median["torch.load"]["seconds"], 4),
                "memory": round(median["ours"]["bytes"] / max(median["torch.load"]["bytes"], 1), 4),
                "ranks": ranks,
            }
        print(json.dumps(ratios))


if __name__ == "__main__":
    main()
