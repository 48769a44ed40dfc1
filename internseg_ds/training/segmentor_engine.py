"""`SegmentorEngine`: a segmentor of an experiment config under DeepSpeed, to train, evaluate, save and
resume.

    from internseg_ds import SegmentorEngine

    config = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
    with SegmentorEngine(config, "ds_configs/zero3_bf16.json", work_dir="work_dirs/mine") as engine:
        engine.train()
        print(f"mIoU {engine.evaluate().metrics['mIoU']:.2%}")

Run it under deepspeed, torchrun, srun or mpirun, or as a plain `python` process. Constructing, training,
evaluating and saving are collective: every rank makes the same calls.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmcv import Config
from torch import Tensor

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import Experiment, read_experiment
from internseg_ds.config.tuning_options import described
from internseg_ds.data.loading import Batch
from internseg_ds.distributed.batch_norms import average_running_statistics
from internseg_ds.distributed.checkpoint_engine import note_failed_writes
from internseg_ds.distributed.construction import set_activation_checkpointing
from internseg_ds.distributed.gathering import forwards
from internseg_ds.distributed.precision import compute_dtypes, set_fp32_matmul
from internseg_ds.distributed.process_group import World, gather_from_ranks, leave, world_from_environment
from internseg_ds.distributed.watchdog import Watchdog
from internseg_ds.distributed.weight_loading import load
from internseg_ds.errors import ConfigError, counted, unless_on_every_rank
from internseg_ds.evaluation.evaluator import (
    Evaluation,
    EvaluationOptions,
    ImageObserver,
    evaluate_datasets,
)
from internseg_ds.host_faults import host_errors_explained
from internseg_ds.models.activation_checkpointing import CheckpointingPolicy
from internseg_ds.monitoring.run_log import start_logging
from internseg_ds.monitoring.throughput import make_meter
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.optimization.parameter_groups import named_groups, parameter_groups
from internseg_ds.output_files import whole_file
from internseg_ds.planning.auto_checkpointing import agreed_checkpointing
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.memory_warnings import after_out_of_memory
from internseg_ds.progress import stage
from internseg_ds.seeding import derived_seed
from internseg_ds.training.checkpointer import Checkpointer
from internseg_ds.training.deepspeed_engine import build_deepspeed_engine, loss_terms
from internseg_ds.training.launcher import Launcher
from internseg_ds.training.resume.find_checkpoint import agree_to_resume, state_of
from internseg_ds.training.resume.resume_point import ResumePoint
from internseg_ds.training.run_options import RunOptions
from internseg_ds.training.startup import log_start, note_start, validate_and_join
from internseg_ds.training.stop_requests import StopRequests, stop_file
from internseg_ds.training.train_state import TrainState
from internseg_ds.training.trainer import train
from internseg_ds.training.work_dir import claim, find_leaders, set_aside

log = logging.getLogger(__name__)


def _experiment_of(
    config: str | os.PathLike | Config | Experiment, cfg_options: Mapping[str, Any] | None
) -> Experiment:
    if not isinstance(config, Experiment):
        return read_experiment(config, cfg_options)
    if cfg_options:
        raise ConfigError("cfg_options change a config while it is read; give them to read_experiment")
    return config


class SegmentorEngine:
    """One experiment under one ds_config.

    plan: the experiment, ds_config, data sets and model that this engine was built from, after all checks.
    options: the constructor's other arguments, with the config's values where they were None.
    deepspeed: DeepSpeed's engine, which holds the segmentor, the optimizer and the schedule.
    ema: the running average of the weights; None without `engine.ema`.
    state: how far the training has come: step, images seen, best score.
    checkpoints: saves, lists and removes the checkpoints of the work directory.
    watch: the thread that ends the run when a rank dies or hangs.
    meter: computes images per second, FLOPs and memory for the records.
    resumed_unscored: whether the checkpoint that the run goes on from was never evaluated.
    stopped: whether the training ended before its last step because somebody asked for it.
    """

    stopped = False
    _recomputation: CheckpointingPolicy | Literal["config"] = "config"

    def __init__(
        self,
        config: str | os.PathLike | Config | Experiment,
        ds_config: str | os.PathLike | Mapping[str, Any],
        *,
        work_dir: str | os.PathLike | None = None,
        seed: int | None = None,
        load_from: str | os.PathLike | None = None,
        resume: str | os.PathLike | None = None,
        cfg_options: Mapping[str, Any] | None = None,
        validate: bool = True,
        saves: bool = True,
        overwrite: bool = False,
        heartbeat_timeout: float = 600.0,
        profiled_steps: int = 0,
    ) -> None:
        """Builds the engine; joins the process group if there is none yet. Collective.

        config: an experiment config, as a path, read by mmcv, or as `read_experiment` returns it.
        ds_config: a DeepSpeed JSON, as a path or as a dict.
        work_dir: where checkpoints, logs and curves go; None: the config's, or work_dirs/NAME_OF_CONFIG.
        seed: of data order, augmentation, initial weights and noise; None: the config's, or 0.
        load_from: weights of a whole segmentor to start from, over the config's `load_from`. A run that resumes
            takes those of its checkpoint instead.
        resume: "auto" (the newest checkpoint of work_dir, if there is one) or the path of a checkpoint to go
            on from exactly, over the config's `resume_from` and `auto_resume`.
        cfg_options: settings that replace those of the config, by dotted names.
        validate: False: the validation set is neither read nor evaluated.
        saves: False: the training writes no checkpoint, for measurements.
        overwrite: whether what an earlier run left in work_dir is moved into a folder beside it. Without, a run
            that would start anew there is refused.
        heartbeat_timeout: seconds without progress on any rank after which the run ends
            (`distributed.watchdog`); 0: no limit.
        profiled_steps: how many steps of a training are recorded (`monitoring.profiler`).

        Raises UserError before any accelerator memory is taken when anything in these contradicts itself or
        is missing.
        """
        world = world_from_environment()
        experiment = _experiment_of(config, cfg_options)
        self.options = RunOptions.resolve(
            experiment,
            work_dir=work_dir,
            seed=seed,
            resume=resume,
            load_from=load_from,
            validate=validate,
            saves=saves,
            overwrite=overwrite,
            heartbeat_timeout=heartbeat_timeout,
            profiled_steps=profiled_steps,
        )
        start_logging(None, level=experiment.logging.level, is_main=world.is_main)
        self.plan, self._owns_group = validate_and_join(experiment, ds_config, self.options, world)
        self._claim_work_dir()
        self._estimator = Estimator(experiment, self.plan.meta_model, crop=self.plan.crop)
        self._watch_over_ranks()
        try:
            with host_errors_explained():
                self._choose_precision()
                self._environment = log_start(self.plan, self.options, self._estimator, self.dtypes)
                self._build(self._agree_to_resume())
        except BaseException as error:
            self._give_up(error)
            raise
        self.watch.at(self.state.step, "idle")

    def _claim_work_dir(self) -> None:
        """Keeps other runs out of the work directory, and clears what interrupted ones left. Collective."""
        ds = self.plan.ds
        node_local = (ds.raw.get("checkpoint") or {}).get("use_node_local_storage", False)
        leaders = find_leaders(self.work_dir, self.world, node_local=node_local, ds_config=ds.source)
        self._claimed = claim(self.work_dir, self.world, leaders)
        if self.options.overwrite:
            set_aside(self.work_dir, leaders, self.world.rank)
        keep = self.plan.experiment.checkpoints.max_keep
        self.checkpoints = Checkpointer(self.work_dir / "checkpoints", keep, leaders)
        self.checkpoints.tidy()
        self.state = TrainState(seed=self.options.seed, run=gather_from_ranks(uuid.uuid4().hex)[0])

    def _agree_to_resume(self) -> ResumePoint | None:
        """The checkpoint that all hosts go on from; None for a run that starts anew. Collective."""
        options, checksums = self.options, self.plan.experiment.engine.checksums
        checkpoint = agree_to_resume(self.plan.resume_from, self.plan.ds.stage, check=checksums)
        if checkpoint is None:
            if options.resume is not None:
                folder = self.checkpoints.folder
                log.info(
                    "--resume auto: there is no checkpoint in %s yet, so this run starts at step 0", folder
                )
            return None
        return ResumePoint(checkpoint, self.plan, may_go_back=options.may_go_back)

    def _watch_over_ranks(self) -> None:
        """From here on a rank that dies or hangs ends all, and each can be asked to stop. Collective."""
        io_timeout = self.plan.experiment.engine.io_timeout
        self.watch = Watchdog(self.world, hang_s=self.options.heartbeat_timeout, io_s=io_timeout)
        file = stop_file(self.work_dir) if self.world.is_main else None
        self.stop_requests = StopRequests(file, self.watch, Launcher())
        self.stop_requests.listen(training=False)

    def _build(self, resume_point: ResumePoint | None) -> None:
        """DeepSpeed's engine with its weights, and the state of the checkpoint to go on from. Collective."""
        experiment = self.plan.experiment
        self._choose_activation_checkpointing()
        self.meter = make_meter(
            experiment.engine.peak_tflops,
            lambda: self._estimator_as_it_trains().training_pass,
            self.world,
            self.dtypes.backbone,
        )
        with stage(f"building the model and its optimizer on {counted(self.world.size, 'process')}"):
            self.deepspeed = build_deepspeed_engine(
                experiment,
                self.plan.ds,
                self.plan.meta_model,
                self.world.device,
                seed=self.options.seed,
                dtypes=self.dtypes,
                recomputation=self._recomputation,
                load_weights=partial(self._load_weights, resume_point),
            )
        self.watch.mark()
        note_failed_writes(self.deepspeed, background=experiment.engine.background_save)
        self.ema: ShardedEma | None = None
        if experiment.engine.ema is not None:
            self.ema = ShardedEma(self.deepspeed, experiment.engine.ema)
        scored = True
        if resume_point is not None:
            resume_point.restore(self.deepspeed, self.ema)
            self._restore_state(resume_point.checkpoint)
            scored = bool(resume_point.checkpoint.manifest.get("metrics"))
        self.resumed_unscored = not all(gather_from_ranks(scored))  # the hosts' manifests may differ
        if self.world.is_main:
            self._write_configs()
            note_start(self.plan, self.options, self._environment, self.state.step)

    def _choose_precision(self) -> None:
        """The dtypes that the parts of the model compute in."""
        experiment, ds, device = self.plan.experiment, self.plan.ds, self.world.device
        self.dtypes = compute_dtypes(experiment.engine, self.plan.meta_model, device, ds.precision)
        set_fp32_matmul(experiment.engine.fp32_matmul, device)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = experiment.cudnn_benchmark and not deterministic

    def _choose_activation_checkpointing(self) -> None:
        """What `engine.recomputation` comes to on this run's devices. Collective where it is "auto"."""
        self._recomputation = agreed_checkpointing(
            self._estimator, self.plan.ds, self.world, self.dtypes.backbone
        )
        set_activation_checkpointing(self.plan.meta_model, self._recomputation)

    def _estimator_as_it_trains(self) -> Estimator:
        """That of the activation checkpointing that was chosen, whose counts the plan may have made already."""
        asked = self.plan.experiment.engine.recomputation
        chosen = self._recomputation
        if chosen == "config" or chosen == asked:
            return self._estimator
        return self._estimator.under(chosen)

    def _load_weights(self, resume_point: ResumePoint | None, model: torch.nn.Module) -> None:
        """Those of the checkpoint to go on from, or those that a fresh run starts from, if any. Collective."""
        self.watch.mark()
        if resume_point is not None:
            resume_point.load_weights(model)
        elif self.plan.weights is not None:
            load(model, self.plan.weights)
            self.plan = replace(self.plan, weights=None)  # tensors of an old file format are all in memory
        self.watch.mark()

    def _restore_state(self, checkpoint: ZeroCheckpoint) -> None:
        """Step, images, seed and best score of the checkpoint that this run goes on from. Collective."""
        seed, batch, new_run = self.options.seed, self.plan.ds.global_batch, self.state.run
        self.state = state_of(checkpoint, seed)
        if self.state.images != self.state.step * batch:
            images = self.state.images / max(self.state.step, 1)
            log.info("the checkpoint's run had another number of images per step: %g -> %d", images, batch)
        if self.state.seed != seed:
            log.warning(
                "the data order and the noise go on by seed %d of the checkpoint, not by %d",
                self.state.seed,
                seed,
            )
        if checkpoint.path.parent.resolve() == self.checkpoints.folder.resolve():
            self.checkpoints.newest = checkpoint.path.name
        else:  # another work directory, another run, which records and trackers shall not mix
            self.state.run = new_run
        self.checkpoints.recall_best(self.state, self.plan.experiment.evaluation.best_by)
        log.info(
            "resumed from %s (%s, ZeRO-%d): step %d, %d images seen",
            checkpoint.path,
            counted(checkpoint.world_size, "process"),
            checkpoint.stage,
            self.state.step,
            self.state.images,
        )

    def _write_configs(self) -> None:
        """The config and the ds_config as they are trained with, into the work directory."""
        ds_config = json.dumps(self.plan.ds.raw, indent=4) + "\n"
        for name, text in (("config.py", self._config_text), ("ds_config.json", ds_config)):
            with whole_file(self.work_dir / name) as file:
                file.write(text.encode())

    @property
    def work_dir(self) -> Path:
        return self.options.work_dir

    @property
    def world(self) -> World:
        return self.plan.world

    @property
    def _named_groups(self) -> list[dict[str, Any]]:
        return named_groups(
            self.plan.meta_model, parameter_groups(self.plan.meta_model, self.plan.experiment.optimizer)
        )

    @cached_property
    def _config_text(self) -> str:
        return self.plan.config_text

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms and accuracies of a micro-batch, as scalars; "loss" is the sum of the terms whose
        names hold "loss", as in mmseg.

        The noise of dropout and drop-path is drawn from (seed, stream position of the batch): a resumed run
        repeats it, and so does another split of the same micro-batches over ranks and accumulation steps. A
        segmentor that changes as it trains has a method `at_step(steps done, all steps)`.
        """
        at_step = getattr(self.deepspeed.module, "at_step", None)
        if at_step is not None:
            at_step(self.state.step, self.plan.experiment.max_steps)
        torch.manual_seed(derived_seed(self.state.seed, "noise", batch.position))
        return loss_terms(self.deepspeed, batch.inputs)

    def train(self) -> TrainState:
        """Trains to the last step of the schedule, logging, saving and evaluating as the config says."""
        # until the end: what comes too late to be answered is no reason to end before the other ranks
        self.stop_requests.listen(training=True)
        with host_errors_explained():
            state = train(self)
        self.watch.at(state.step, "idle")
        return state

    def evaluate(
        self,
        *,
        verbose: bool = True,
        stop: Callable[[], bool] = lambda: False,
        observers_of: Callable[[int, Any], Sequence[ImageObserver]] = lambda _, __: (),
    ) -> Evaluation:
        """mmseg's metrics on the validation set with the weights as they are, or with their average (EMA)
        where the run keeps one.

        The data set is split over the ranks. Under ZeRO-3 each rank gathers the weights once, or they run in
        step: `engine.evaluation_weights`. stop: asked before each image; when it says so on some rank, all
        raise Abandoned. observers_of: as of `evaluate_datasets`. Batch norms have the mean of all ranks' running
        statistics, from here on too.
        """
        if self.plan.val_set is None:
            raise ConfigError(
                "this engine was built with validate=False and has no validation set; build it with "
                "validate=True to evaluate"
            )
        average_running_statistics(self.deepspeed.module)
        experiment = self.plan.experiment
        ready = forwards(
            self.deepspeed.module,
            experiment.model,
            self.dtypes.backbone,
            self.world.device,
            heads=self.dtypes.heads,
            autocast=self.plan.ds.precision == "autocast",
            weights=experiment.engine.evaluation_weights,
        )
        averaged = self.ema.in_place_of_weights() if self.ema is not None else nullcontext()

        def stop_asked() -> bool:
            self.watch.mark()  # a sign of progress, with each image
            return stop()

        with self.watch.during(self.state.step, "evaluating"), averaged, ready as segmentor:
            return evaluate_datasets(
                segmentor,
                self.plan.val_set,
                EvaluationOptions(
                    self.world,
                    experiment.workers,
                    metrics=experiment.evaluation.metrics,
                    verbose=verbose,
                    stop=stop_asked,
                ),
                observers_of,
            )

    def save(self) -> Path | None:
        """Writes a ZeRO checkpoint of this step into WORK_DIR/checkpoints; returns its directory, or None
        when it could not be written (a warning says why).

        With `engine.background_save` it returns sooner, and the checkpoint is published at a later log step,
        evaluation, save, or `close`.
        """
        average_running_statistics(self.deepspeed.module)
        dataset = self.plan.train_set
        meta = {
            "CLASSES": list(dataset.CLASSES),
            "PALETTE": [list(map(int, colour)) for colour in dataset.PALETTE],
            "config": self._config_text,
            "steps_per_epoch": self.plan.experiment.schedule.steps_per_epoch,
            "tune": described(self.plan.experiment.engine.tune),
        }
        with self.watch.during(self.state.step, "saving"):
            return self.checkpoints.save(self.deepspeed, self.state, meta, self._named_groups, self.ema)

    def close(self) -> None:
        """Publishes a save that is still being written, frees the engine, and leaves the process group if
        this engine joined it."""
        self.watch.at(self.state.step, "saving")
        self.checkpoints.finish()
        self.deepspeed.destroy()
        dist.barrier()  # a rank that dies on its way here is still noticed
        self.watch.close()
        if self._owns_group:
            leave()
        self.stop_requests.close()
        self._claimed.close()

    def __enter__(self) -> "SegmentorEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        """After an error: tells the other ranks of one that they may not know, publishes what is being saved,
        and leaves the group that this engine joined."""
        self.stop_requests.close(failed=True)
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note(
                after_out_of_memory(self._estimator, self.plan.ds, self.world, self._recomputation)
            )
        error_of_this_rank = unless_on_every_rank(error)
        if error_of_this_rank is None:
            self.watch.at(self.state.step, "saving")
            self.checkpoints.finish()
        self.watch.close(error_of_this_rank)
        if self._owns_group:
            leave()
        self._claimed.close()  # whoever catches it may try again in this process
