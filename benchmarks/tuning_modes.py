"""What `engine.tune` trains, side by side: a small backbone learns the generated scenes, and is transferred to
CamVid frozen, with low-rank adapters, with its last blocks, and whole.

    python benchmarks/tuning_modes.py --data data/camvid

A stand-in for pretrained weights: 1 M parameters that have seen some drawn things. It shows that every mode
trains and what it costs, and says nothing of published backbones. CamVid is expected as
configs/intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py describes it. All runs have one learning rate, one
schedule and one seed. Prints per mode mIoU on the validation set after the last step, the parameters that
train, and CPU seconds of a step of plain PyTorch over those of full tuning; ends with a line of JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import whole_runs
from mmcv import Config
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SCENES = ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
CAMVID = ROOT / "configs/intern_vit_tiny/upernet_intern_vit_tiny_224_camvid.py"
BACKBONE = dict(
    embed_dim=128, depth=4, num_heads=4, img_size=112, pretrain_size=112, out_indices=[0, 1, 2, 3]
)
"""Of the config of the generated scenes."""
SIDE = 112
"""Of a crop, in pixels; half that of the CamVid config."""
IMAGE = (240, 180)
BATCH = 4
LEARNING_RATE = 1e-3
LOG_EVERY = 5


def main() -> None:
    args = options()
    modes: dict[str, Any] = {
        "frozen": "head",
        "LoRA": {"lora": {"rank": args.rank}},
        "last blocks": {"last_blocks": args.last_blocks},
        "full": "all",
    }
    with tempfile.TemporaryDirectory(prefix="tuning_modes_") as name:
        folder = Path(name)
        scenes = folder / "scenes"
        write_scenes(scenes, args.scenes)
        pretrained = train(
            scenes_experiment(scenes, args.pretraining_steps, args.pretraining_steps), folder / "pretraining"
        )
        rows = {}
        weights = folder / "pretraining/checkpoints"
        experiments = {
            mode: camvid_experiment(args.data, args.steps, tune, weights) for mode, tune in modes.items()
        }
        for mode, cfg in experiments.items():
            records = train(cfg, folder / mode.replace(" ", "_"))
            rows[mode] = {
                "mIoU": next(record["mIoU"] for record in reversed(records) if "mIoU" in record),
                "trained": trained_parameters(cfg),
            }
    for mode, seconds in seconds_per_step(experiments).items():
        rows[mode]["step_s"] = seconds
    report(rows, pretrained, args)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/camvid"), help="CamVid's folder")
    parser.add_argument(
        "--scenes", type=int, default=200, help="generated training images (default: %(default)s)"
    )
    parser.add_argument("--pretraining-steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="on CamVid (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--last-blocks", type=int, default=2, help="of 4 (default: %(default)s)")
    args = parser.parse_args()
    if not (args.data / "images/training").is_dir():
        parser.error(f"--data {args.data} is no folder with CamVid's images/training")
    return args


def write_scenes(folder: Path, count: int) -> None:
    """The generated data set in ADE20K's layout."""
    from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k

    write_generated_ade20k(folder, training=count, validation=8)


def scenes_experiment(root: Path, steps: int, interval: int) -> Config:
    """The demo's experiment. interval: of saves; 0: none."""
    cfg = Config.fromfile(SCENES)
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(root)
    return scheduled(cfg, steps, interval)


def camvid_experiment(root: Path, steps: int, tune: Any, pretrained: Path | None) -> Config:
    """CamVid at half its size, on the backbone of the demo with the weights that it has learned; None: with
    random ones."""
    cfg = Config.fromfile(CAMVID)
    cfg.model.backbone.update(BACKBONE, pretrained=pretrained and str(pretrained))
    cfg.model.decode_head.in_channels = [BACKBONE["embed_dim"]] * 4
    cfg.model.auxiliary_head.in_channels = BACKBONE["embed_dim"]
    cfg.model.test_cfg = dict(mode="whole")
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(root)
        for step in cfg.data[split].pipeline:
            if "img_scale" in step:
                step.img_scale = IMAGE
            if step.type == "RandomCrop":
                step.crop_size = (SIDE, SIDE)
            if step.type == "Pad":
                step.size = (SIDE, SIDE)
    cfg.engine.tune = tune
    cfg.optimizer.lr = LEARNING_RATE
    return scheduled(cfg, steps, interval=0)


def scheduled(cfg: Config, steps: int, interval: int) -> Config:
    """cfg with so many steps and one evaluation, at the end. interval: of saves; 0: none."""
    cfg.runner.max_iters = steps
    cfg.lr_config.warmup_iters = min(20, steps // 2)
    cfg.evaluation = dict(interval=steps, metric="mIoU")
    cfg.checkpoint_config = dict(by_epoch=False, interval=interval)
    cfg.log_config = dict(interval=LOG_EVERY, hooks=[dict(type="TextLoggerHook", by_epoch=False)])
    cfg.data.samples_per_gpu = cfg.engine.global_batch = BATCH
    cfg.engine.peak_tflops = 1.0  # not measured: nobody asks for a utilization here
    return cfg


def train(cfg: Config, work_dir: Path) -> list[dict[str, Any]]:
    """Trains in a process of its own, under ZeRO-1 in fp32, on any device; returns its records."""
    records = whole_runs.train(cfg, {"zero_optimization": {"stage": 1}}, work_dir)
    print(f"{work_dir.name} is done", flush=True)
    return records


def trained_parameters(cfg: Config) -> dict[str, int]:
    """Of the backbone alone, and of the whole segmentor."""
    from internseg_ds.config.experiment import read_experiment
    from internseg_ds.distributed.construction import build_on_meta, choose_trained

    experiment = read_experiment(cfg)
    model = build_on_meta(experiment.model)
    choose_trained(model, experiment.engine)
    return {
        what: sum(param.numel() for param in part.parameters() if param.requires_grad)
        for what, part in (("backbone", model.get_submodule("backbone")), ("all", model))
    }


def seconds_per_step(experiments: dict[str, Config], rounds: int = 7) -> dict[str, float]:
    """CPU seconds of this process in a plain step of PyTorch (forward, backward, AdamW) of each mode: the
    median of some rounds, in which the modes take turns. Other programs on the machine disturb it little."""
    steps = {mode: plain_step(cfg) for mode, cfg in experiments.items()}
    taken: dict[str, list[float]] = {mode: [] for mode in steps}
    for _ in range(rounds + 1):
        for mode, step in steps.items():
            began = time.process_time()
            step()
            taken[mode].append(time.process_time() - began)
    return {mode: statistics.median(seconds[1:]) for mode, seconds in taken.items()}


def plain_step(cfg: Config) -> Callable[[], None]:
    """A training step of the experiment's model on random images, on the CPU."""
    from internseg_ds.config.ds_config import resolve_ds_config
    from internseg_ds.config.experiment import read_experiment
    from internseg_ds.distributed.construction import (
        build_for_training,
        build_on_meta,
        choose_trained,
        tune_for_training,
    )

    experiment = read_experiment(cfg)
    meta_model = build_on_meta(experiment.model)
    choose_trained(meta_model, experiment.engine)
    ds = resolve_ds_config(
        {"zero_optimization": {"stage": 1}},
        experiment="",
        micro_batch=BATCH,
        world_size=1,
        optimizer=cfg.optimizer,
    )
    model = build_for_training(experiment.model, ds, torch.device("cpu"), 0)
    tune_for_training(model, experiment.engine.tune, meta_model, ds, 0)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    inputs = {
        "img": torch.randn(BATCH, 3, SIDE, SIDE),
        "img_metas": [{}] * BATCH,
        "gt_semantic_seg": torch.randint(0, 11, (BATCH, 1, SIDE, SIDE)),
    }

    def step() -> None:
        terms = model(return_loss=True, **inputs)
        torch.stack([value for name, value in terms.items() if "loss" in name]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def report(
    rows: dict[str, dict[str, Any]], pretraining: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    full = rows["full"]["step_s"]
    table = Table(
        "mode", "mIoU", "trained", "of the backbone", "step over full", title="CamVid, tiny stand-in"
    )
    for mode, row in rows.items():
        row["step_over_full"] = row.pop("step_s") / full
        table.add_row(
            mode,
            f"{row['mIoU']:.1f}",
            f"{row['trained']['all']:,}",
            f"{row['trained']['backbone']:,}",
            f"{row['step_over_full']:.2f}",
        )
    Console().print(table)
    score = next(record["mIoU"] for record in reversed(pretraining) if "mIoU" in record)
    print(f"the backbone comes from {args.pretraining_steps} steps on generated scenes: mIoU {score:.1f}")
    print(json.dumps({"steps": args.steps, "pretraining_mIoU": score, "modes": rows}))


if __name__ == "__main__":
    main()
