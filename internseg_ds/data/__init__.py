"""Data: mmseg's data sets and pipelines in a reproducible order, and the transforms that the configs name. Loads no
DeepSpeed."""

from internseg_ds.data.ade20k import ADE20KDataset
from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.loading import Batch, evaluation_images, training_batches
from internseg_ds.data.sampler import GlobalBatchSampler

__all__ = [
    "ADE20KDataset",
    "Batch",
    "GlobalBatchSampler",
    "build_datasets",
    "evaluation_images",
    "training_batches",
]
