"""InternVL's published backbone (a user's clone of OpenGVLab/InternVL, read where it lies) under mmseg's
heads. Nothing in it is changed.

What a user can set: `use_flash_attn=[]` where flash-attn is missing (the file passes the whole list to each
block, and only an empty one is false), and `segmentor.float()` against its own cast to bf16.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from mmcv import Config
from mmcv.runner.optimizer import build_optimizer_constructor
from mmseg.models import build_segmentor
from timing import Timed, time_steps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workload import Workload, micro_batches

from internseg_ds.distributed.process_group import world_from_environment


def published_segmentor(workload: Workload, cfg: Config) -> nn.Module:
    """mmseg's segmentor around the published backbone, in the backbone's own bf16 or, where the ds_config has
    no bf16, in fp32."""
    folder = Path(workload.published) / "segmentation"
    module = _import(folder / "mmseg_custom/models/backbones/intern_vit_6b.py")
    if cfg.optimizer.get("constructor") == "CustomLayerDecayOptimizerConstructor":
        _import(folder / "mmcv_custom/layer_decay_optimizer_constructor.py")
    if not getattr(module, "has_flash_attn", hasattr(module, "FlashAttention")):
        cfg.model.backbone.use_flash_attn = []
    with world_from_environment().device:
        model = build_segmentor(cfg.model)
    if not workload.ds_config.get("bf16", {}).get("enabled"):
        model.float()
    if workload.weights is not None:
        model.load_state_dict(torch.load(workload.weights)["state_dict"])
    return model


def _import(path: Path):
    name = f"published_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def groups_of(model: nn.Module, cfg: Config) -> list[dict]:
    """The parameter groups of its own optimizer constructor."""
    params: list[dict] = []
    settings = {
        key: value for key, value in cfg.optimizer.items() if key not in ("constructor", "paramwise_cfg")
    }
    build_optimizer_constructor(
        dict(
            type=cfg.optimizer.get("constructor", "DefaultOptimizerConstructor"),
            optimizer_cfg=settings,
            paramwise_cfg=cfg.optimizer.get("paramwise_cfg"),
        )
    ).add_params(params, model)
    return [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in params]


def ddp(workload: Workload) -> Timed:
    """The loop that mmcv's runner makes of it: forward, `_parse_losses` (which reads the losses back from the
    device), zero_grad, backward, step."""
    from contenders.bare_deepspeed import adamw

    cfg, world = workload.experiment, world_from_environment()
    model = published_segmentor(workload, cfg)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)  # as mmseg sets it
    optimizer = adamw(groups_of(model, cfg), cfg.optimizer, world.device)
    batches = micro_batches(workload, world.rank, world.size, world.device)

    def step() -> Tensor:
        loss, _ = model._parse_losses(wrapped(return_loss=True, **next(batches)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    wrapped.train()
    return time_steps(step, workload.warmup, workload.steps, world.device)


def deepspeed(workload: Workload) -> Timed:
    from contenders.bare_deepspeed import loop

    cfg = workload.experiment
    return loop(workload, published_segmentor(workload, cfg), lambda model: groups_of(model, cfg))
