"""The keys of the sections that configured mmcv's runner: read here, known to mmcv or mmseg but without
effect here, or known to nobody.

In: a config. Out: lines for the log, or a ConfigError that names the key and the nearest one that exists.
What mmcv and mmseg know is read from the signatures of the classes that they would build.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mmseg.core  # noqa: F401 - registers mmseg's hooks
from mmcv.runner import HOOKS, CheckpointHook, IterBasedRunner
from mmseg.core import DistEvalHook, EvalHook
from mmseg.datasets import DATASETS, build_dataloader
from torch.utils.data import DataLoader

from internseg_ds.config.known_keys import ELSEWHERE, KNOWN, READ
from internseg_ds.errors import ConfigError

OF_WANDB = ("init_kwargs", "define_metric_cfg", "log_artifact")
LOG_HOOKS = {
    "TextLoggerHook": (),
    "TensorboardLoggerHook": ("log_dir",),
    "WandbLoggerHook": OF_WANDB,
    "MMSegWandbHook": (*OF_WANDB, "num_eval_images", "log_checkpoint", "log_checkpoint_metadata"),
}
"""The hooks of `log_config.hooks` that are interpreted, and their arguments that are."""
OWN_OF_LOADER = (
    "dataset",
    "batch_size",
    "num_workers",
    "sampler",
    "batch_sampler",
    "collate_fn",
    "worker_init_fn",
    "num_gpus",
    "dist",
    "kwargs",
)
"""What mmseg gives its DataLoader itself, so that no config can."""
OTHER_NAMES = {"batch_size": "samples_per_gpu", "num_workers": "workers_per_gpu"}
"""What MMEngine and torch call the same."""
GIVEN_BY_MMCV = (
    "self",
    "runner",
    "args",
    "kwargs",
    "eval_kwargs",
    "dataloader",
    "model",
    "results",
    "logger",
)
WHY = {
    "data.shuffle": "training images are always shuffled, by the seed",
    "data.drop_last": "batches are cut from an endless stream of images, so none is short",
    "data.persistent_workers": "data workers live as long as the run",
    "data.pin_memory": "batches for a GPU are always pinned",
    "data.val_dataloader": "an evaluation takes as many windows at a time as fit; "
    "model.test_cfg.batch_size says how many",
    "data.test_dataloader": "an evaluation takes as many windows at a time as fit; "
    "model.test_cfg.batch_size says how many",
    "evaluation.efficient_test": "no prediction is kept",
    "evaluation.tmpdir": "ranks add up confusion matrices and write no files",
    "evaluation.gpu_collect": "ranks add up confusion matrices",
    "evaluation.rule": "each score of mmseg's is the better the higher",
    "optimizer_config.loss_scale": "there is no fp16; the ds_config and engine.backbone_dtype say the "
    "precision",
    "checkpoint_config.save_optimizer": "checkpoints always hold what resuming needs; "
    "launch/consolidate.py makes a file of weights alone",
    "checkpoint_config.out_dir": "checkpoints are in WORK_DIR/checkpoints",
    "checkpoint_config.save_last": "the last step is always saved",
    "WandbLoggerHook.out_suffix": "train.log, config.py and ds_config.json are sent",
    "MMSegWandbHook.out_suffix": "train.log, config.py and ds_config.json are sent",
}
"""Why a key that mmcv or mmseg know has no effect here, where there is more to say."""


def section_notes(cfg: Mapping[str, Any], path: str) -> list[str]:
    """A line for each key that mmcv or mmseg know and that has no effect here. Raises ConfigError for one
    that nobody knows."""
    notes: list[str] = []
    kind = (cfg.get("optimizer_config") or {}).get("type", "OptimizerHook")
    optimizer_hook = HOOKS.get(kind) if isinstance(kind, str) else kind
    for section, known in _known_elsewhere(optimizer_hook).items():
        lenient = section in ("evaluation", "log_config") or (
            section == "optimizer_config" and optimizer_hook is None
        )
        notes += _look(_section(cfg, section, path), section, KNOWN[section], known, path, lenient=lenient)
    for key in _section(cfg, "model.test_cfg", path):  # heads may read keys of their own there
        if key not in KNOWN["model.test_cfg"] and (
            near := difflib.get_close_matches(key, KNOWN["model.test_cfg"], n=1, cutoff=0.75)
        ):
            raise ConfigError(f"unknown key {key!r} in model.test_cfg of {path}; did you mean {near[0]!r}?")
    if kind != "OptimizerHook":
        notes.append(
            f"optimizer_config.type = {kind!r} has no effect here: the engine clips and steps itself, in "
            "the precision that the ds_config says"
        )
    return notes


def hook_notes(hooks: Iterable[Mapping[str, Any]], interval: int, path: str) -> list[str]:
    """The same for the arguments of `log_config.hooks`; interval: of log_config."""
    notes = []
    for hook in hooks:
        kind = hook["type"]
        if kind not in LOG_HOOKS:
            near = (
                difflib.get_close_matches(str(kind), LOG_HOOKS, n=1, cutoff=0.8)
                if not isinstance(kind, type) and HOOKS.get(kind) is None
                else []
            )
            if near:
                raise ConfigError(
                    f"log_config.hooks of {path} has type={kind!r}, which nobody knows; did you mean "
                    f"{near[0]!r}?"
                )
            notes.append(f"log_config.hooks: {kind} is not known here and is left out")
            continue
        as_it_is = {"type": kind, "by_epoch": False, "interval": interval}
        given = {key: value for key, value in hook.items() if key not in as_it_is or value != as_it_is[key]}
        notes += _look(given, kind, LOG_HOOKS[kind], _parameters(HOOKS.get(kind)), path)
    return notes


def near_misses(cfg: Mapping[str, Any], path: str) -> list[str]:
    """A warning for each key at the top of the config that nobody reads and that is nearly one that is read.
    It may be a variable of the file's own."""
    warnings = []
    for key in cfg:
        if (
            key not in READ
            and key not in ELSEWHERE
            and (near := difflib.get_close_matches(key, READ, n=1, cutoff=0.85))
        ):
            warnings.append(f"{key} of {path} is read by nobody; did you mean {near[0]}?")
    return warnings


def _section(cfg: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    node: Any = cfg
    for part in name.split("."):
        node = node.get(part) or {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"{name}={node!r} of {path} must be a section dict(...)")
    return node


def _look(
    keys: Iterable[str],
    section: str,
    read: Iterable[str],
    elsewhere: set[str],
    path: str,
    *,
    lenient: bool = False,
) -> Iterator[str]:
    """The lines of one section. elsewhere: what mmcv and mmseg know of it. lenient: they take any other key
    too, so that only a near miss is an error."""
    why = {
        key.rpartition(".")[2]: reason
        for key, reason in WHY.items()
        if key.startswith(f"{section.partition('.')[0]}.")
    }
    for key in keys:
        if key in read:
            continue
        known = {*read, *elsewhere}
        near = (
            [OTHER_NAMES[key]]
            if OTHER_NAMES.get(key) in known
            else difflib.get_close_matches(key, known, n=1, cutoff=0.75 if lenient else 0.6)
        )
        if key not in known and (near or not lenient):
            guess = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} in {section} of {path}; {guess}")
        yield f"{section}.{key} has no effect here" + (f": {why[key]}" if key in why else "")


def _known_elsewhere(optimizer_hook: type | None) -> dict[str, set[str]]:
    """What mmcv and mmseg know of each section, beside what is read here."""
    loader = {*_parameters(build_dataloader), *_parameters(DataLoader)} - {*OWN_OF_LOADER}
    return {
        "data": {*loader, "val_dataloader", "test_dataloader"},
        "data.train_dataloader": loader,
        "evaluation": {
            *_parameters(EvalHook),
            *_parameters(DistEvalHook),
            *(
                name
                for dataset in DATASETS.module_dict.values()
                for name in _parameters(getattr(dataset, "evaluate", None))
            ),
        },
        "runner": _parameters(IterBasedRunner),
        "optimizer_config": _parameters(optimizer_hook),
        "checkpoint_config": {
            "type",
            "deepspeed",
            *_parameters(CheckpointHook),
            *_parameters(IterBasedRunner.save_checkpoint),
        },
        "log_config": set(),
    }


def _parameters(made: Callable | type | None) -> set[str]:
    """The names that a function, or the constructors of a class and its bases, take of a config."""
    if isinstance(made, type):
        makers = [vars(base)["__init__"] for base in made.__mro__ if "__init__" in vars(base)]
        makers.remove(vars(object)["__init__"])
    else:
        makers = [made] if made is not None else []
    names = {name for maker in makers for name in inspect.signature(maker).parameters}
    return names - {*GIVEN_BY_MMCV}
