"""The keys that a config may have, and those of `--cfg-options`: a path that names nothing is an error which names the nearest one that does."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmcv import Config

from internseg_ds.distributed.lr_schedule import arguments, policies
from internseg_ds.engine.options import EngineOptions
from internseg_ds.errors import ConfigError

SECTIONS = (
    "model",
    "data",
    "optimizer",
    "lr_config",
    "runner",
    "evaluation",
    "checkpoint_config",
    "log_config",
    "optimizer_config",
    "engine",
)
OPTIONAL = SECTIONS[5:]

# keys of mmcv's runner that have no effect here, each with the line that says so
REPLACED = {
    "deepspeed": "every run here is a DeepSpeed run",
    "deepspeed_config": "the ds_config is given on the command line",
    "custom_hooks": "there are no hooks; precision is the engine's, and an average of the weights (EMAHook) is engine.ema",
    "dist_params": "nccl on GPUs, gloo on CPUs",
    "workflow": "training and evaluation alternate as `evaluation.interval` says",
    "opencv_num_threads": "data workers use one OpenCV thread each",
    "mp_start_method": "data workers are forked",
    "find_unused_parameters": "ZeRO needs no such setting",
    "device": "the device is the accelerator, where there is one",
    "gpu_ids": "processes are the launcher's",
    "fp16": "there is no fp16; the ds_config and engine.backbone_dtype say the precision",
    "momentum_config": "only the learning rate is scheduled",
    "omp_num_threads": "set OMP_NUM_THREADS in the environment",
    "mkl_num_threads": "set MKL_NUM_THREADS in the environment",
}

RUN = ("work_dir", "seed", "load_from", "resume_from", "auto_resume", "log_level", "cudnn_benchmark")
"""Single settings at the top of a config."""
READ = (*SECTIONS, *RUN, *REPLACED)
"""All that is read of a file; the rest are variables of its own."""
ELSEWHERE = ("custom_imports", "total_iters")
"""What mmcv and mmseg read at the top of a config while they load it, or read long ago."""

# what the engine reads of the sections that configured mmcv's runner, and mmseg of `test_cfg`
KNOWN = {
    "data": ("samples_per_gpu", "workers_per_gpu", "train", "val", "test", "train_dataloader"),
    "data.train_dataloader": ("samples_per_gpu", "workers_per_gpu"),
    "evaluation": ("interval", "metric", "save_best", "by_epoch", "pre_eval"),
    "checkpoint_config": ("interval", "max_keep_ckpts", "by_epoch"),
    "optimizer_config": ("grad_clip", "cumulative_iters", "type"),
    "optimizer_config.grad_clip": ("max_norm", "norm_type"),
    "lr_config": ("policy", *sorted(set().union(*map(arguments, policies())))),
    "log_config": ("interval", "hooks"),
    "runner": ("type", "max_iters"),
    "model.test_cfg": ("mode", "crop_size", "stride", "batch_size"),
    "model.train_cfg": (),
}


def check_option(cfg: Config, option: str, path: str) -> None:
    """A `--cfg-options` path must name something: an existing key, a setting of `engine`, or an argument of a section that has a `type`.

    path: the config's, for messages. Raises ConfigError when it names nothing.
    """
    *parents, leaf = option.split(".")
    node: Any = cfg
    for depth, part in enumerate([*parents, leaf]):
        prefix = ".".join(parents[:depth])
        known: list[str] = []
        if isinstance(node, (list, tuple)):
            known = [str(index) for index in range(len(node))]
        elif isinstance(node, (Config, Mapping)):
            known = list(node.keys())
        if part in known:
            if isinstance(node, tuple) or (isinstance(node, list) and depth == len(parents)):
                raise ConfigError(
                    f"--cfg-options {option}: one element of a list cannot be set; write all of them, {prefix}=[..., ...]"
                )
            if depth == 0 and part not in READ:
                raise ConfigError(
                    f"--cfg-options {option}: {part} is a variable of {path}, which its sections have taken already; set what they made of it"
                )
            node = node[int(part)] if isinstance(node, (list, tuple)) else node[part]
            continue
        if depth == 0 and part in RUN and not parents:
            return
        if depth == 0 and part == "engine":
            known = ["engine"]
            node = {setting.name: None for setting in fields(EngineOptions)}
            continue
        if prefix == "engine":
            known = [setting.name for setting in fields(EngineOptions)]
            if part in known:
                return
        section = f"{prefix}.{part}" if prefix else part
        if section in KNOWN and depth < len(parents) and (part in OPTIONAL or part in KNOWN.get(prefix, ())):
            node = {}  # a section that the file leaves out
            continue
        is_argument = part == leaf and depth == len(parents) and isinstance(node, Mapping)
        if is_argument and (part in KNOWN[prefix] if prefix in KNOWN else "type" in node):
            return
        known += KNOWN.get(prefix, ()) if prefix else READ
        near = difflib.get_close_matches(part, known, n=1)
        guess = (
            f"; did you mean {'.'.join(filter(None, [prefix, near[0]]))}?"
            if near
            else f"; there are {', '.join(known) or 'no keys'}"
        )
        raise ConfigError(f"--cfg-options {option}: {part!r} exists nowhere in {prefix or path}{guess}")
