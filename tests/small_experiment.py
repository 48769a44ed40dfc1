"""The demo's experiment with a model of a few thousand parameters, for tests that drive the engine from
Python."""

from pathlib import Path

import torch
import torch.distributed as dist
from mmcv import Config, DictAction

from internseg_ds import SegmentorEngine
from internseg_ds.data.loading import Batch, training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from tests.conftest import ROOT, TINY, data_options
from tests.end_to_end.conftest import SMALL


def small_experiment(root: Path, *options: str, after_normalize: str | None = None) -> Config:
    """root: of the data set. options: KEY=VALUE. after_normalize: a transform of the test's own that stands
    there in the training pipeline."""
    cfg = Config.fromfile(ROOT / TINY)
    for option in (
        *SMALL,
        *data_options(root),
        "data.workers_per_gpu=0",
        "checkpoint_config.interval=0",
        *options,
    ):
        key, value = option.split("=", 1)
        cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
    if after_normalize is not None:
        names = [step["type"] for step in cfg.data.train.pipeline]
        cfg.data.train.pipeline.insert(names.index("Normalize") + 1, dict(type=after_normalize))
    return cfg


def first_batch(engine: SegmentorEngine) -> Batch:
    """This rank's first two images of the engine's training set."""
    dataset, rank, ranks = engine.plan.train_set, dist.get_rank(), dist.get_world_size()
    sampler = GlobalBatchSampler(len(dataset), 2, rank=rank, world_size=ranks, seed=0, start=0)
    return next(training_batches(dataset, sampler, workers=0, seed=0, device=torch.device("cpu")))
