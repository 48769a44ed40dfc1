"""Images per second of our evaluation against mmseg's test loops (`single_gpu_test`, `multi_gpu_test`): same
model, data and config, in turn, in one run.

    python benchmarks/evaluate.py                                            one process: against single_gpu_test
    torchrun --nproc_per_node 2 benchmarks/evaluate.py                       several: against multi_gpu_test
    python benchmarks/evaluate.py --config CONFIG                            another model, such as 6 B on a GPU

Weights are random: no score is looked at, only how far the areas of the predicted classes differ. Ends with a
line of JSON: ours_over_mmseg (images per second, median of the rounds' ratios).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from internseg_ds.cli import command_line
from internseg_ds.distributed.process_group import World, world_from_environment
from internseg_ds.distributed.watchdog import joined

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"


def segmentor_of(model: object, device: torch.device, seed: int) -> nn.Module:
    """The config's segmentor with the weights that a training would start from, in the precision of an
    evaluation."""
    from internseg_ds.config.ds_config import resolve_ds_config
    from internseg_ds.distributed.construction import build_for_training
    from internseg_ds.distributed.precision import apply_precision, backbone_dtype

    compute = backbone_dtype("auto", device)
    ds = resolve_ds_config(
        {"zero_optimization": {"stage": 1}},
        experiment="",
        micro_batch=1,
        world_size=1,
        optimizer={"type": "AdamW", "lr": 1e-3},
    )
    with torch.no_grad():
        segmentor = build_for_training(model, ds, device, seed)
    segmentor.backbone.to(compute)
    apply_precision(segmentor, compute)
    return segmentor.eval().requires_grad_(False)


def theirs(segmentor: nn.Module, entry: object, world: World, workers: int, folder: Path) -> object:
    """mmseg's own loop, as its tools/test.py calls it."""
    from mmcv.parallel import MMDataParallel
    from mmseg.apis import multi_gpu_test, single_gpu_test
    from mmseg.datasets import build_dataloader, build_dataset

    loader = build_dataloader(
        build_dataset(entry, dict(test_mode=True)),
        1,
        workers,
        dist=world.size > 1,
        shuffle=False,
        persistent_workers=workers > 0,
    )
    wrapped = MMDataParallel(
        segmentor, device_ids=[world.device.index if world.device.type == "cuda" else -1]
    )
    if world.size == 1:
        results = single_gpu_test(wrapped, loader, pre_eval=True)
    else:
        results = multi_gpu_test(wrapped, loader, tmpdir=str(folder / "collected"), pre_eval=True)
    return torch.stack([torch.stack(list(areas)) for areas in results]).double().sum(0) if results else None


def ours(segmentor: nn.Module, dataset: object, world: World, workers: int) -> torch.Tensor:
    from internseg_ds.distributed.gathering import Forwards
    from internseg_ds.evaluation.evaluator import EvaluationOptions, evaluate_dataset

    options = EvaluationOptions(world, workers, verbose=False)
    return evaluate_dataset(Forwards(segmentor), dataset, options).areas


def timed(function: Callable[[], object], world: World) -> tuple[float, object]:
    """Seconds until all ranks are done, and what the function returned."""
    if world.size > 1:
        dist.barrier()
    began = time.perf_counter()
    result = function()
    if world.size > 1:
        dist.barrier()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python benchmarks/evaluate.py --images 24 --batch-size 8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=str(TINY), help="experiment config (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=48, help="images of the generated data set (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, help="windows per forward of ours (default: that of the config)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each, in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the config, as launch/train.py takes them",
    )
    args = parser.parse_args()

    from mmcv import DictAction

    from internseg_ds.config.experiment import read_experiment
    from internseg_ds.preflight.dataset_checks import validation_set
    from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k

    options = dict(item.split("=", 1) for item in args.cfg_options)
    world = world_from_environment()
    with tempfile.TemporaryDirectory() as name, joined(world):
        folder = [name]
        if world.size > 1:
            dist.broadcast_object_list(folder)
        root = Path(folder[0]) / "ade"
        if world.is_main:
            write_generated_ade20k(root, training=1, validation=args.images)
        if world.size > 1:
            dist.barrier()
        experiment = read_experiment(
            args.config,
            {
                **{key: DictAction._parse_iterable(value) for key, value in options.items()},
                "model.backbone.pretrained": None,
                "data.test.data_root": str(root),
                **({"model.test_cfg.batch_size": args.batch_size} if args.batch_size else {}),
            },
        )
        dataset, segmentor = (
            validation_set(experiment, "test"),
            segmentor_of(experiment.model, world.device, seed=0),
        )
        seconds: dict[str, list[float]] = {"ours": [], "mmseg": []}
        for number in range(args.rounds + 1):  # the first warms up
            took, counted = timed(lambda: ours(segmentor, dataset, world, args.workers), world)
            their_time, expected = timed(
                lambda: theirs(segmentor, experiment.test, world, args.workers, Path(folder[0])), world
            )
            if number:
                seconds["ours"].append(took)
                seconds["mmseg"].append(their_time)
        if world.is_main:
            differing = (counted[2:] - expected[2:]).abs().sum().item() / expected[2:].sum().item()
            print(
                f"\n{world.size} process{'es' * (world.size > 1)} on {world.device.type}, {args.images} "
                "images; "
                f"the areas of the classes differ by {differing:.2e}"
            )
            for who, values in seconds.items():
                print(
                    f"{who:6} {args.images / statistics.median(values):8.2f} images/s   rounds: "
                    f"{', '.join(f'{value:.2f} s' for value in values)}"
                )
            ratio = statistics.median(
                theirs / ours for ours, theirs in zip(seconds["ours"], seconds["mmseg"], strict=True)
            )
            print(
                json.dumps(
                    {
                        "ours_over_mmseg": round(ratio, 4),
                        "processes": world.size,
                        "device": world.device.type,
                        "images": args.images,
                    }
                )
            )


if __name__ == "__main__":
    command_line.run(main)
