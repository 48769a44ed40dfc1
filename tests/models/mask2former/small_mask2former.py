"""A small Mask2Former, and batches for it."""

import torch
from mmcv import ConfigDict
from mmseg.models import build_segmentor
from torch import Tensor, nn

import internseg_ds.models  # noqa: F401 - registers the head
from internseg_ds.config.experiment import read_experiment
from tests.conftest import ROOT

CONFIG = ROOT / "configs/intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py"


def config(classes: int = 5, **train_cfg) -> ConfigDict:
    """Of the demo's segmentor, with few classes and points."""
    model = read_experiment(CONFIG).model
    model.decode_head.num_classes, model.decode_head.num_queries = classes, 6
    model.decode_head.loss_cls.class_weight = [1.0] * classes + [0.1]
    model.train_cfg.update({"num_points": 40, **train_cfg})
    return model


def build(model: ConfigDict) -> nn.Module:
    """With weights that are all random: nothing stays at its starting one or zero."""
    torch.manual_seed(0)
    segmentor = build_segmentor(model)
    for param in segmentor.parameters():
        nn.init.normal_(param, mean=1.0 if param.dim() == 1 else 0.0, std=0.1)
    return segmentor


def features(size: int = 8, batch: int = 2, channels: int = 128) -> list[Tensor]:
    """Maps as a backbone makes them of images of 4 size x 4 size pixels."""
    torch.manual_seed(1)
    return [torch.randn(batch, channels, size >> level, size >> level) for level in range(4)]


def targets(*labels: list[int], size: int = 32) -> tuple[list[Tensor], list[Tensor]]:
    """gt_labels and gt_masks of images that hold these classes, in random places."""
    torch.manual_seed(2)
    masks = []
    for classes in labels:
        which = torch.randint(max(1, len(classes)), (size, size))
        masks.append(
            torch.stack([which == index for index in range(len(classes))]).byte()
            if classes
            else torch.zeros(0, size, size, dtype=torch.uint8)
        )
    return [torch.tensor(classes, dtype=torch.int64) for classes in labels], masks
