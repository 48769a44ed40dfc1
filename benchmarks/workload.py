"""What the benchmarks train: an experiment of a given size over generated images that lie in memory, so that
neither files nor decoding are timed.

In: a config file of ours and what changes in it. Out: an mmcv Config (for `SegmentorEngine` and
`build_segmentor` alike), the ds_config that goes with it, and a stream of micro-batches that is the same for
every contender. Loads none of our models: the published code registers its own under the same names.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from mmcv import Config
from mmcv.parallel import DataContainer, collate
from mmcv.runner.optimizer import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor
from mmseg.datasets import CustomDataset, build_dataset
from mmseg.datasets.builder import DATASETS, PIPELINES
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from internseg_ds.data.sampler import GlobalBatchSampler

ROOT = Path(__file__).parent.parent
TINY = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
TIMM = "configs/timm_tiny/upernet_dinov3_tiny_112_ade20k.py"
FULL = "configs/intern_vit_6b/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
IMAGES = 16


@dataclass(frozen=True)
class Workload:
    """One training to be timed; it travels to the processes as JSON. options: --cfg-options of `config`.
    groups: number of parameter groups, None for the config's own."""

    config: str = TINY
    options: dict[str, Any] = field(default_factory=dict)
    ds_config: dict[str, Any] = field(default_factory=dict)
    image_px: int = 112
    classes: int = 150
    micro_batch: int = 4
    groups: int | None = None
    cells: int = 8
    """An image's labels are rectangles, so many on a side; where heads look at each class of an image, 4 make
    as many classes as ADE20K's images have."""
    steps: int = 15
    warmup: int = 3
    weights: str | None = None
    """A state dict that every contender starts from, else each draws its own."""
    published: str | None = None
    """A clone of OpenGVLab/InternVL."""

    @classmethod
    def read(cls, path: Path) -> "Workload":
        return cls(**json.loads(path.read_text()))

    @property
    def experiment(self) -> Config:
        """The config with a constant learning rate, no dropout or drop-path (so that losses can be compared),
        and images in memory."""
        cfg = Config.fromfile(str(ROOT / self.config))
        cfg.merge_from_dict(
            {
                "model.backbone.drop_path_rate": 0.0,
                "model.backbone.pretrained": None,
                "log_config.hooks": [],
                "load_from": None,
            }
        )
        if "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None  # weights of InternImage
        for head in filter(None, (cfg.model.get(name) for name in ("decode_head", "auxiliary_head"))):
            head.num_classes = self.classes
            if "dropout_ratio" in head:
                head.dropout_ratio = 0.0
        if cfg.model.test_cfg.get("mode") == "slide":
            cfg.model.test_cfg = dict(mode="whole")
        train = cfg.data.train
        while "dataset" in train:  # RepeatDataset and its like
            train = train.dataset
        keys = train.pipeline[-1]["keys"]  # of the step that collects what the model takes
        cfg.data = dict(
            samples_per_gpu=self.micro_batch,
            workers_per_gpu=0,
            train=dict(
                type="GeneratedInMemory",
                classes=[f"class {index}" for index in range(self.classes)],
                pipeline=[
                    dict(
                        type="GeneratedPixels",
                        image_px=self.image_px,
                        classes=self.classes,
                        cells=self.cells,
                        masks="gt_masks" in keys,
                    ),
                    dict(
                        type="Collect",
                        keys=list(keys),
                        meta_keys=("filename", "ori_shape", "img_shape", "pad_shape", "scale_factor", "flip"),
                    ),
                ],
            ),
        )
        cfg.engine = {key: value for key, value in cfg.get("engine", {}).items() if key != "global_batch"}
        # as the model's with_cp says, which the other contenders go by
        cfg.engine["recomputation"] = "config"
        cfg.lr_config = dict(policy="poly", power=0.0, min_lr=0.0, by_epoch=False)
        cfg.merge_from_dict(self.options)
        if self.groups is not None:
            cfg.optimizer.constructor, cfg.optimizer.paramwise_cfg = "EvenGroups", dict(groups=self.groups)
        return cfg


@PIPELINES.register_module()
class GeneratedPixels:
    """Noise of a normalised image's scale, and rectangles of labels: made once per image, then kept. masks:
    one for each class beside them, for Mask2Former."""

    def __init__(self, image_px: int, classes: int, cells: int = 8, masks: bool = False) -> None:
        self.masks = masks
        self._made = lru_cache(maxsize=None)(lambda index: self._make(index, image_px, classes, cells))

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image, labels = self._made(int(results["img_info"]["filename"]))
        shape = (*image.shape[1:], 3)
        found = labels.unique()
        masks = (
            {
                "gt_labels": DataContainer(found),
                "gt_masks": DataContainer((labels == found[:, None, None]).to(torch.uint8)),
            }
            if self.masks
            else {}
        )
        return {
            **results,
            **masks,
            "filename": results["img_info"]["filename"],
            "ori_shape": shape,
            "img_shape": shape,
            "pad_shape": shape,
            "scale_factor": 1.0,
            "flip": False,
            "img": DataContainer(image, stack=True),
            "gt_semantic_seg": DataContainer(labels, stack=True),
        }

    @staticmethod
    def _make(index: int, side: int, classes: int, cells: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(classes, (1, cells, cells), generator=generator)
        rows = torch.arange(side) * cells // side
        return torch.randn(3, side, side, generator=generator), labels[:, rows][:, :, rows]


@DATASETS.register_module()
class GeneratedInMemory(CustomDataset):
    """IMAGES images with no files behind them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(img_dir="", **kwargs)

    def load_annotations(self, *_: Any) -> list[dict[str, Any]]:
        return [{"filename": str(index), "ann": {}} for index in range(IMAGES)]


@OPTIMIZER_BUILDERS.register_module()
class EvenGroups(DefaultOptimizerConstructor):
    """As many parameter groups as `paramwise_cfg.groups` says, of equally many consecutive tensors (give or
    take one), all with the same settings."""

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        tensors, groups = list(module.parameters()), self.paramwise_cfg["groups"]
        params.extend(
            {"params": [tensor], "name": f"group {index * groups // len(tensors)}"}
            for index, tensor in enumerate(tensors)
        )


def loader(workload: Workload, rank: int, world_size: int) -> DataLoader:
    """Endless micro-batches of a rank on the CPU, in the order in which `SegmentorEngine.train` would hand
    them to it (seed 0)."""
    dataset = build_dataset(workload.experiment.data.train)
    return DataLoader(
        dataset,
        workload.micro_batch,
        sampler=RankOrder(len(dataset), workload.micro_batch, rank, world_size),
        collate_fn=_plain,
    )


class RankOrder(Sampler[int]):
    """The images of a rank one after the other; torch's DataLoader makes the micro-batches of them."""

    def __init__(self, length: int, micro_batch: int, rank: int, world_size: int) -> None:
        self.batches = GlobalBatchSampler(length, micro_batch, rank=rank, world_size=world_size)
        self.share = length // world_size

    def __iter__(self) -> Iterator[int]:
        return (index for batch in self.batches for _, index in batch)

    def __len__(self) -> int:
        """Of one pass over the data set, for loops that ask; the order has no end."""
        return self.share


def _plain(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: container.data[0] for name, container in collate(samples, samples_per_gpu=len(samples)).items()
    }


def micro_batches(
    workload: Workload, rank: int, world_size: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """What a segmentor's forward takes: img (b, 3, h, w), gt_semantic_seg (b, 1, h, w) on `device`,
    img_metas."""
    for batch in loader(workload, rank, world_size):
        yield on_device(batch, device)


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A micro-batch with its tensors, and lists of them, there."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in batch.items()}


def ds_config_of(path: str, dtype: str) -> dict[str, Any]:
    """A ds_config file; dtype "float32" drops its bf16 and autocast sections, "bfloat16" leaves it as it
    is."""
    raw = json.loads(Path(path).read_text())
    return {
        key: value
        for key, value in raw.items()
        if dtype == "bfloat16" or key not in ("bf16", "torch_autocast")
    }


def resolved_ds_config(workload: Workload, cfg: Config, world_size: int) -> dict[str, Any]:
    """The ds_config of the contenders: "auto" sizes as transformers derives them from the width.
    Our engine derives its own from the blocks, and gathers by blocks."""
    from internseg_ds.config.ds_config import BackboneSizes, resolve_ds_config

    optimizer: Mapping[str, Any] = cfg.optimizer
    return copy.deepcopy(
        resolve_ds_config(
            workload.ds_config,
            experiment=workload.config,
            micro_batch=workload.micro_batch,
            world_size=world_size,
            optimizer=optimizer,
            sizes=BackboneSizes(_width(cfg)),
        ).raw
    )


def _width(cfg: Config) -> int:
    """Of the backbone's tokens."""
    width: int = cfg.model.backbone.get("embed_dim", cfg.model.auxiliary_head.in_channels)
    return width


def size_of(name: str, norm: str) -> dict[str, Any]:
    """Fields of a Workload by the size's name. norm: "BN" or "SyncBN" of the heads (torch's SyncBatchNorm has
    no CPU kernel)."""
    norms = {f"model.{head}.norm_cfg.type": norm for head in ("decode_head", "auxiliary_head")}
    if name == "tiny":
        return dict(config=TINY, options=norms, image_px=112, micro_batch=4)
    if name == "300m":
        return dict(
            config=TINY,
            options=norms
            | vit(1024, 24, 16)
            | {
                "model.backbone.img_size": 224,
                "model.decode_head.channels": 256,
                "model.auxiliary_head.channels": 256,
                "model.backbone.qkv_bias": True,
                "model.backbone.qk_normalization": False,
            },
            image_px=224,
            micro_batch=2,
        )
    if name == "dinov3":  # ViT-S/16, 22 M parameters
        return dict(
            config=TIMM,
            options=norms
            | {
                "model.backbone.model_args": dict(embed_dim=384, depth=12, num_heads=6),
                "model.backbone.out_indices": [2, 5, 8, 11],
                "model.decode_head.in_channels": [384] * 4,
                "model.auxiliary_head.in_channels": 384,
                "optimizer.paramwise_cfg.num_layers": 12,
            },
            image_px=224,
            micro_batch=2,
        )
    return dict(config=FULL, options=norms, image_px=504, micro_batch=2)


def vit(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Options that give the tiny experiment a backbone of another size; the feature maps come from four
    evenly spaced blocks."""
    quarter = depth // 4
    return {
        "model.backbone.embed_dim": width,
        "model.backbone.depth": depth,
        "model.backbone.num_heads": heads,
        "model.backbone.out_indices": [quarter - 1, 2 * quarter - 1, 3 * quarter - 1, depth - 1],
        "model.decode_head.in_channels": [width] * 4,
        "model.auxiliary_head.in_channels": width,
        "optimizer.paramwise_cfg.num_layers": depth,
    }
