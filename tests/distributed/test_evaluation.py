"""Evaluations of one ZeRO-3 model by 1, 2 and 3 processes, from whole copies and in step: the same counts to
the last one, and nobody waits for ever."""

import json
from pathlib import Path

import cv2
import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmcv import Config

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.data.datasets import build_datasets
from internseg_ds.distributed import gathering
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.gathering import forwards
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.distributed.process_group import World
from internseg_ds.evaluation.evaluator import EvaluationOptions, evaluate_dataset
from internseg_ds.optimization.parameter_groups import parameter_groups
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import small

OPTIMIZER = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}
SIZES = [(40, 400), (300, 60), (112, 112), (9, 5), (90, 130), (64, 300), (113, 127)]
"""From one window to nine, and some that are no whole patches."""
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Noise in ADE20K's layout, in very different sizes."""
    root, random = tmp_path_factory.mktemp("odd"), np.random.default_rng(0)
    for kind, ending in (("images", "jpg"), ("annotations", "png")):
        (root / kind).mkdir()
        for number, (height, width) in enumerate(SIZES):
            shape = (height // 8 + 2, width // 8 + 2, 3)[: 3 if kind == "images" else 2]
            picture = cv2.resize(
                random.integers(0, 151, shape, dtype=np.uint8),
                (width, height),
                interpolation=cv2.INTER_NEAREST,
            )
            cv2.imwrite(str(root / kind / f"{number}.{ending}"), picture)
    return root


def dataset_of(root: Path, count: int):
    pipeline = [step for step in Config.fromfile(ROOT / TINY).test_pipeline]
    pipeline[1].update(img_scale=None, img_ratios=[1.0])  # the images as they are
    pipeline[1].transforms = [step for step in pipeline[1].transforms if step.type != "ResizeToMultiple"]
    entry = Config(
        dict(
            type="ADE20KDataset",
            data_root=str(root),
            img_dir="images",
            ann_dir="annotations",
            pipeline=pipeline,
        )
    )._cfg_dict
    dataset = build_datasets(entry, "data.val", test_mode=True)
    dataset.img_infos = dataset.img_infos[:count]
    return dataset


def engine_of(world_size: int, stage: int, autocast: bool):
    precision = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if autocast else {}
    ds = resolve_ds_config(
        {**precision, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
        experiment="",
        micro_batch=1,
        world_size=world_size,
        optimizer=OPTIMIZER,
    )
    config = small()
    model = build_for_training(config, ds, DEVICE, seed=0)
    for number, param in enumerate(model.parameters()):
        with gathered([param], modifier_rank=0):
            if param.dim() > 1:  # of some size, so that predictions are not one class
                torch.nn.init.normal_(
                    param.data,
                    0.0,
                    2 / param.data[0].numel() ** 0.5,
                    generator=torch.Generator().manual_seed(number),
                )
    apply_precision(model, torch.bfloat16 if autocast else torch.float32, autocast=autocast)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(parameter_groups(model, OPTIMIZER)), config=ds.raw
    )
    return config, engine


def step(engine, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    image, truth = (
        torch.randn(1, 3, 112, 112, generator=generator),
        torch.randint(0, 150, (1, 1, 112, 112), generator=generator),
    )
    losses = engine(image, [{}], return_loss=True, gt_semantic_seg=truth)
    loss = sum(value for name, value in losses.items() if "loss" in name)
    engine.backward(loss)
    engine.step()
    return loss.item()


def evaluated(engine, config, dataset, way: str, autocast: bool = False):
    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank())
    with forwards(
        engine.module,
        config,
        torch.bfloat16 if autocast else torch.float32,
        DEVICE,
        autocast=autocast,
        weights=way.split()[0],
    ) as ready:
        # the only process has the whole weights in its shards: they need no room
        in_step = way == "partitioned" or (way == "auto without room" and world.size > 1)
        assert not ready.segmentor.training
        assert ready.in_step == (in_step and engine.zero_optimization_partition_weights())
        return evaluate_dataset(ready, dataset, EvaluationOptions(world, workers=0, verbose=False))


def confusions(root: Path, out: Path) -> None:
    """Rank 0 writes {way: confusion matrix}."""
    deepspeed.init_distributed(verbose=False)
    config, engine = engine_of(dist.get_world_size(), 3, False)
    found = {}
    for way in ("whole", "partitioned", "auto", "auto without room"):
        if way == "auto without room":
            gathering.ROOM = 0.0  # of the free memory
        for count in (len(SIZES), 1):  # of one image, some ranks get none
            result = evaluated(engine, config, dataset_of(root, count), way)
            assert result.images == count and result.confusion.sum() > 0
            found[f"{way} {count}"] = result.confusion.tolist()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """What one process counts."""
    out = tmp_path_factory.mktemp("alone") / "found.json"
    spawn(confusions, 1, root, out)
    found = json.loads(out.read_text())
    # several classes are predicted
    assert sum(any(row[column] for row in found[f"whole {len(SIZES)}"]) for column in range(150)) > 5
    assert found["partitioned 1"] == found["whole 1"] != found[f"whole {len(SIZES)}"]
    return found


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_every_number_of_processes_counts_the_same_and_none_waits_for_ever(processes, root, alone, tmp_path):
    spawn(confusions, processes, root, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    for way, confusion in alone.items():
        assert found[way] == confusion, way


def same_losses(root: Path, settings: list[tuple[int, bool]]) -> None:
    """A step before and two after evaluations of each kind, and without any."""
    deepspeed.init_distributed(verbose=False)
    for stage, autocast in settings:
        losses = []
        for ways in ([], ["whole", "partitioned"]):
            config, engine = engine_of(2, stage, autocast)
            engine.train()
            before = step(engine, 0)
            for way in ways:
                evaluated(engine, config, dataset_of(root, 2), way, autocast)
                assert engine.module.training
            losses.append([before, step(engine, 1), step(engine, 2)])
            engine.destroy()
        assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_an_evaluation_leaves_the_training_as_it_was(root):
    spawn(same_losses, 2, root, [(3, False), (3, True), (2, False)])
