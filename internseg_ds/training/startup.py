"""The stages of a run's start before anything is built: validate, join the process group, take the work
directory, and log what is about to be trained."""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.precision import ComputeDtypes
from internseg_ds.distributed.process_group import World, adopt, gather_from_ranks, hold_meeting_port, join
from internseg_ds.distributed.watchdog import time_limit
from internseg_ds.errors import UserError, counted
from internseg_ds.monitoring.environment import environment_lines
from internseg_ds.monitoring.run_log import start_logging
from internseg_ds.monitoring.run_starts import RunStart, learning_rates, write_start
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.output_files import check_writable
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_warnings import no_room_to_save, shortfall
from internseg_ds.preflight.image_sizes import size_lines
from internseg_ds.preflight.preflight import Plan, check, survey_data
from internseg_ds.preflight.run_summary import Destination, summary
from internseg_ds.progress import stage
from internseg_ds.training.launcher import Launcher
from internseg_ds.training.resume.find_checkpoint import checkpoint_to_resume, compare_with_checkpoint
from internseg_ds.training.run_options import RunOptions
from internseg_ds.training.stop_requests import check_no_stop_file
from internseg_ds.training.work_dir import check_unused

log = logging.getLogger(__name__)


def validate(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    options: RunOptions,
    world: World,
) -> Plan:
    """All that one process can check by itself: work directory, checkpoint to resume, config, data, weights.

    Takes no accelerator and talks to no other process. Raises UserError.
    """
    with time_limit(experiment.engine.io_timeout, "looking at the work directory, the weights and the data"):
        check_writable(options.work_dir / "checkpoints", "--work-dir")
        if options.profiled_steps:
            check_writable(options.work_dir / "profile", "--profile")
        check_no_stop_file(options.work_dir)
        checksums = experiment.engine.checksums
        resume_from = checkpoint_to_resume(options.resume, options.work_dir, check=checksums)
        resumes = options.resume == "auto"
        check_unused(options.work_dir, resume_from, overwrite=options.overwrite, resumes=resumes)
        return checked_plan(
            experiment,
            ds_config,
            world,
            validate=options.validate,
            load_from=options.load_from,
            resume_from=resume_from,
        )


def checked_plan(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    world: World,
    *,
    validate: bool,
    load_from: str | os.PathLike | None,
    resume_from: Path | None,
) -> Plan:
    """The plan of a run, or of a dry run, that has passed every check: first those that every rank makes, then
    those that only the main rank makes. Arguments and errors are those of `preflight.check`."""
    with stage("checking the model, the settings and the data"):
        plan = check(
            experiment, ds_config, world, validate=validate, load_from=load_from, resume_from=resume_from
        )
        return survey_data(compare_with_checkpoint(plan))


def validate_and_join(
    experiment: Experiment,
    ds_config: str | os.PathLike | Mapping[str, Any],
    options: RunOptions,
    world: World,
) -> tuple[Plan, bool]:
    """The plan of a run that every process agrees to, and whether this call made the process group (else the
    one that was there is used). Collective.

    Raises UserError on every rank where one rank cannot run, so that none waits for it.
    """
    owns_group = not dist.is_initialized()
    timeout = options.collective_timeout(experiment.engine.io_timeout)
    # held until this function returns
    run = str(options.work_dir.resolve())
    _port = hold_meeting_port(world, run) if owns_group else None
    try:
        plan = validate(experiment, ds_config, options, world)
    except UserError as error:
        if owns_group:
            join(world, timeout, refusal=error, run=run)  # raises it, here and on the others
        raise
    with stage(f"meeting of {counted(world.size, 'process')}"):
        if owns_group:
            join(world, timeout, run=run)
        else:
            adopt()
    return plan, owns_group


def log_start(plan: Plan, options: RunOptions, estimator: Estimator, dtypes: ComputeDtypes) -> list[str]:
    """Opens the run's log, with its environment, which it returns, a summary of the run, and all that the checks
    have to say. Collective."""
    experiment, is_main = plan.experiment, plan.world.is_main
    header = environment_lines(options.seed, gather_from_ranks(socket.gethostname()))
    start_logging(options.work_dir, level=experiment.logging.level, is_main=is_main, header=header)
    _, size_warnings = size_lines(experiment, plan.crop)
    if is_main:
        to = Destination(options.work_dir, options.saves, Launcher().resume_command())
        with stage("planning", after_s=2.0):
            lines = summary(plan, estimator, dtypes, to)
        for line in lines:
            log.info("%s", line)
        for warning in (*experiment.warnings, *size_warnings):
            log.warning("config: %s", warning)
    for note in experiment.notes:
        log.info("config: %s", note)
    if is_main:
        for warning in plan.warnings:
            log.warning(warning)
    for note in plan.notes:
        log.info("%s", note)
    if is_main:
        for warning in _resource_warnings(plan, options, estimator):
            log.warning(warning)
    return header


def note_start(plan: Plan, options: RunOptions, environment: Sequence[str], step: int) -> None:
    """Notes this start in the work directory. By one rank.

    environment: as `log_start` returns it. step: that the run goes on from.
    """
    experiment, model = plan.experiment, plan.meta_model
    groups = parameter_groups(model, experiment.optimizer)
    sizes = [sum(param.numel() for param in group["params"]) for group in groups]
    train_set, val_set = plan.train_set, plan.val_set
    data = {
        "training images": f"{len(train_set):,}, as {plan.crop[0]} x {plan.crop[1]} pixels",
        "validation images": "none" if val_set is None else f"{len(val_set):,}",
        "classes": str(len(train_set.CLASSES)),
        "images per step": f"{plan.ds.global_batch} = {counted(plan.ds.world_size, 'process')} x "
        f"{counted(plan.ds.micro_batch, 'image')} x {counted(plan.ds.accumulation, 'accumulation step')}",
    }
    write_start(
        options.work_dir,
        RunStart(
            time=time.time(),
            step=step,
            max_steps=experiment.max_steps,
            config=experiment.path,
            environment=list(environment),
            resume_command=Launcher().resume_command(),
            data=data,
            warnings=[*(f"config: {warning}" for warning in experiment.warnings), *plan.warnings],
            notes=[*(f"config: {note}" for note in experiment.notes), *plan.notes],
            learning_rates=learning_rates(experiment.schedule, groups, sizes, step),
        ),
    )


def _resource_warnings(plan: Plan, options: RunOptions, estimator: Estimator) -> list[str]:
    """What memory and disk will not hold, by the plan."""
    if options.saves:
        disk = no_room_to_save(estimator, plan.ds, options.work_dir)
    else:
        disk = "this run saves no checkpoint, not when it is asked to stop either (--no-save)"
    return [warning for warning in (shortfall(estimator, plan.ds, plan.world), disk) if warning]
