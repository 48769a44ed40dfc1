"""A run in a few lines, before it is built: model, data, batch, precision, plan, and where things go.

In: a `Plan`. Out: aligned lines for the log.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from internseg_ds.distributed.precision import ComputeDtypes
from internseg_ds.errors import counted, reason_of
from internseg_ds.monitoring.run_log import LIBRARIES_LOG
from internseg_ds.planning.auto_checkpointing import as_it_will_train
from internseg_ds.planning.devices import DEVICES, Cluster, Device
from internseg_ds.planning.estimate import estimate_step
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_estimate import Platform
from internseg_ds.planning.step_time import Assumptions
from internseg_ds.preflight.image_sizes import size_lines
from internseg_ds.preflight.preflight import Plan
from internseg_ds.progress import duration

GIB = 2**30
TRACKERS = {"TensorboardLoggerHook": "TensorBoard", "WandbLoggerHook": "wandb", "MMSegWandbHook": "wandb"}
"""What hooks of `log_config` write to."""


@dataclass(frozen=True)
class Destination:
    """work_dir: where everything goes. saves: whether the run writes checkpoints. resume_command: what goes on with
    it; "" where that is not known."""

    work_dir: Path
    saves: bool
    resume_command: str


def summary(plan: Plan, estimator: Estimator, dtypes: ComputeDtypes, destination: Destination) -> list[str]:
    """The lines. By one rank, and before the model takes memory. Never raises for what cannot be planned."""
    rows = {
        "model": _model(plan),
        "weights": _weights(plan),
        "data": _data(plan),
        "images": size_lines(plan.experiment, plan.crop)[0],
        "batch": _batch(plan),
        "precision": _precision(plan, dtypes),
        "plan": _planned(plan, estimator),
        "evaluates": _cadence(plan, destination),
        "written to": _written(plan, destination.work_dir),
        "to stop": f"Ctrl-C, SIGTERM, or touch {shlex.quote(str(destination.work_dir / 'STOP'))}"
        + (": it saves and ends" if destination.saves else ": it ends"),
    }
    if destination.saves:
        rows["to resume"] = destination.resume_command or 'the same with resume="auto"'
    width = max(map(len, rows))
    return [f"{name:<{width}}  {text}" for name, text in rows.items() if text]


def _model(plan: Plan) -> str:
    parameters = list(plan.meta_model.parameters())
    whole = sum(each.numel() for each in parameters)
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    parts = [
        type(part).__name__
        for name in ("backbone", "neck", "decode_head", "auxiliary_head")
        for part in _modules(getattr(plan.meta_model, name, None))
    ]
    share = "all trained" if trained == whole else f"{_millions(trained)} trained ({trained / whole:.1%})"
    return (
        f"{type(plan.meta_model).__name__} of {', '.join(parts)}: {_millions(whole)} parameters, {share}; "
        f"{plan.experiment.name}"
    )


def _modules(part: object) -> list[torch.nn.Module]:
    """A part of a segmentor, or each of several."""
    if isinstance(part, torch.nn.ModuleList):
        return list(part)
    return [part] if isinstance(part, torch.nn.Module) else []


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _weights(plan: Plan) -> str:
    if plan.resume_from is not None:
        return f"those of {plan.resume_from}, where training goes on"
    if plan.weights is None:
        return "random"
    return f"{plan.weights.weights.path}: {plan.weights.summary('to load')}"


def _data(plan: Plan) -> str:
    held_out = "none" if plan.val_set is None else f"{len(plan.val_set):,}"
    return (
        f"{len(plan.train_set):,} training images, {held_out} for validation, "
        f"{counted(len(plan.train_set.CLASSES), 'class', 'classes')}"
    )


def _batch(plan: Plan) -> str:
    ds, steps = plan.ds, plan.experiment.max_steps
    return (
        f"{counted(ds.global_batch, 'image')} per step = {counted(ds.world_size, 'process')} x "
        f"{counted(ds.micro_batch, 'image')} x {counted(ds.accumulation, 'accumulation step')}; "
        f"{counted(steps, 'step')} = {steps * ds.global_batch / len(plan.train_set):,.1f} epochs"
    )


def _precision(plan: Plan, dtypes: ComputeDtypes) -> str:
    names = [str(each).removeprefix("torch.") for each in (plan.ds.param_dtype, *dtypes)]
    device = plan.world.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return (
        f"{counted(plan.world.size, 'process')} on {where}, ZeRO-{plan.ds.stage}, {names[0]} parameters, "
        f"backbone computes in {names[1]}, heads in {names[2]}"
    )


def _planned(plan: Plan, estimator: Estimator) -> str:
    """Memory by the estimate, and the time of a step where the device is one that it knows, alone on one host."""
    ds = plan.ds
    try:
        platform = Platform.of_this_process(plan.experiment, ds, plan.world)
        there = f"{platform.device_bytes / GIB:.1f} GiB per {platform.unit}"
        if estimator.fits_for_sure(ds, platform.device_bytes):
            words = [f"far less than the {there} that there are"]
        else:
            estimator = as_it_will_train(estimator, ds, platform)
            words = [f"{estimator.training_memory(ds, platform).peak / GIB:.1f} of {there}"]
        device = _known_device(platform)
        if device is not None and platform.per_host == plan.world.size:
            cluster = Cluster(
                device, 1, plan.world.size, between_gbs=50.0
            )  # between nodes, of which there is one
            step = estimate_step(estimator, ds, cluster, Assumptions())
            words.append(f"{duration(step.time.total)} per step, {step.images_per_s:.3g} images/s")
        return f"{', '.join(words)}; by the estimate, not measured"
    except Exception as error:  # an odd model, or setting, is no reason not to train it
        return f"none: {reason_of(error)}"


def _known_device(platform: Platform) -> Device | None:
    """The device whose data sheet the planner has: by its name and about its memory."""
    if not platform.on_gpu:
        return None
    name = torch.cuda.get_device_name().replace(" ", "")
    total = torch.cuda.mem_get_info()[1] / GIB
    return next(
        (
            device
            for device in DEVICES.values()
            if device.name.partition("-")[0] in name and abs(device.memory_gib / total - 1) < 0.1
        ),
        None,
    )


def _cadence(plan: Plan, destination: Destination) -> str:
    experiment = plan.experiment
    words = []
    if plan.val_set is not None:
        best = experiment.evaluation.best_by
        every = experiment.evaluation.interval
        words.append(
            f"{'every ' + counted(every, 'step') if every > 0 else 'at the end'}"
            + (f", best by {best}" if best and destination.saves else "")
        )
    else:
        words.append("never")
    if destination.saves:
        every, keep = experiment.checkpoints.interval, experiment.checkpoints.max_keep
        words.append(
            f"saves {'every ' + counted(every, 'step') if every > 0 else 'at the end'}, "
            + (f"the newest {keep} and the best are kept" if keep > 0 else "all are kept")
        )
    else:
        words.append("saves nothing")
    return "; ".join(words)


def _written(plan: Plan, work_dir: Path) -> str:
    hooks = [hook["type"] for hook in plan.experiment.logging.hooks]
    trackers = list(dict.fromkeys(TRACKERS[hook] for hook in hooks if hook in TRACKERS))
    files = ["train.log", LIBRARIES_LOG, "metrics.jsonl", "report.html", "checkpoints"]
    return f"{work_dir}: {', '.join(files)}" + (f"; {', '.join(trackers)}" if trackers else "")
