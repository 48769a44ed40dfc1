"""`SegmentorEngine`: a segmentor of an experiment config under DeepSpeed, to train, evaluate, save and resume.

    from internseg_ds import SegmentorEngine

    with SegmentorEngine("configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py", "ds_configs/zero3_bf16.json", work_dir="work_dirs/mine") as engine:
        engine.train()
        print(engine.evaluate().metrics["mIoU"])

Run it under deepspeed, torchrun, srun or mpirun, or as a plain `python` process. Constructing, training, evaluating and saving are collective: every
rank makes the same calls.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from mmcv import Config
from torch import Tensor

from internseg_ds.checkpoints.weights import weights_of
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.data.loading import Batch
from internseg_ds.distributed.checkpoint_engine import note_failed_writes
from internseg_ds.distributed.construction import choose_recomputation
from internseg_ds.distributed.ema import ShardedEma
from internseg_ds.distributed.gathering import forwards
from internseg_ds.distributed.loading import fit_segmentor, load
from internseg_ds.distributed.parameter_groups import named_groups, parameter_groups
from internseg_ds.distributed.precision import backbone_dtype, heads_dtype, set_fp32_matmul
from internseg_ds.distributed.process_group import (
    World,
    adopt,
    join,
    leave,
    of_all_ranks,
    world_from_environment,
)
from internseg_ds.distributed.restoring import restore
from internseg_ds.distributed.watch import Watch, check_heartbeat_timeout, time_limit
from internseg_ds.engine.auto_recomputation import agreed_recomputation
from internseg_ds.engine.checkpointing import Checkpoints
from internseg_ds.engine.config_text import config_text
from internseg_ds.engine.deepspeed_engine import build_deepspeed_engine, loss_terms
from internseg_ds.engine.environment import environment_lines
from internseg_ds.engine.evaluator import Evaluation, evaluate_each
from internseg_ds.engine.experiment import Experiment, read_experiment
from internseg_ds.engine.image_sizes import size_lines
from internseg_ds.engine.launcher import Launcher
from internseg_ds.engine.outputs import check_writable, whole_file
from internseg_ds.engine.planner import Planner
from internseg_ds.engine.preflight import Plan, check
from internseg_ds.engine.profiling import check_profiled_steps
from internseg_ds.engine.resuming import (
    agree_to_resume,
    check_resumable,
    checkpoint_to_resume,
    one_before,
    state_of,
)
from internseg_ds.engine.run_warnings import after_out_of_memory, no_room_to_save, shortfall
from internseg_ds.engine.state import TrainState
from internseg_ds.engine.stopping import StopRequests, check_no_stop_file, stop_file
from internseg_ds.engine.trackers import start_logging
from internseg_ds.engine.trainer import train
from internseg_ds.engine.utilization import make_meter
from internseg_ds.engine.work_dir import check_unused, claim, leaders, set_aside
from internseg_ds.errors import CheckpointError, ConfigError, DamagedError, UserError, of_one_rank
from internseg_ds.host_faults import told_in_a_sentence
from internseg_ds.models.recomputation import Recomputation
from internseg_ds.seeding import derived_seed

log = logging.getLogger(__name__)


class SegmentorEngine:
    """One experiment under one ds_config. Attributes: `plan` (experiment, ds_config, data sets), `deepspeed` (DeepSpeed's engine), `state`, `checkpoints`,
    `watch` (over the other ranks), `meter` (of speed and memory), `resumed_unscored` (whether the checkpoint that it went on from was never
    evaluated), `stopped` (whether training ended early, on request)."""

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
        """config: an experiment config; ds_config: a DeepSpeed JSON. work_dir, seed: None as the config says (work_dirs/NAME_OF_CONFIG, 0). load_from: weights
        of a whole segmentor to start from (over the config's `load_from`). resume: "auto" (the newest checkpoint of work_dir, if any) or a checkpoint to go
        on from exactly (over the config's `resume_from` and `auto_resume`). validate: False leaves the validation set alone. saves: False has the training
        write no checkpoint, for a measurement that has no room for one. overwrite: what an earlier run left in work_dir is moved into a folder beside it;
        without, a run that would start anew there is refused. A run that resumes takes its weights from the checkpoint, whatever load_from says.
        heartbeat_timeout: seconds in which no rank gets on that end the run (`distributed.watch`); 0: any. profiled_steps: how many steps of a training are
        recorded (`engine.profiling`). Joins the process group if there is none yet.

        Raises UserError before any accelerator memory is taken when anything in these contradicts itself or is missing.
        """
        world = world_from_environment()
        check_heartbeat_timeout(heartbeat_timeout)
        self.saves = saves
        self.profiled_steps = check_profiled_steps(profiled_steps)
        if isinstance(config, Experiment) and cfg_options:
            raise ConfigError("cfg_options change a config while it is read; give them to read_experiment")
        experiment = config if isinstance(config, Experiment) else read_experiment(config, cfg_options)
        start_logging(None, level=experiment.log_level, is_main=world.is_main)
        self.work_dir = Path(work_dir) if work_dir else experiment.work_dir
        seed = experiment.seed if seed is None else seed
        refusal: UserError | None = None
        io_s = experiment.engine.io_timeout
        try:
            with time_limit(io_s, "looking at the work directory, the weights and the data"):
                check_writable(self.work_dir / "checkpoints", "--work-dir")
                if self.profiled_steps:
                    check_writable(self.work_dir / "profile", "--profile")
                check_no_stop_file(self.work_dir)
                resume = resume or experiment.resume_from
                resume_from = checkpoint_to_resume(resume, self.work_dir, check=experiment.engine.checksums)
                check_unused(self.work_dir, resume_from, overwrite=overwrite, resumes=resume == "auto")
                self.plan: Plan = check(
                    experiment,
                    ds_config,
                    world,
                    validate=validate,
                    load_from=load_from,
                    resume_from=resume_from,
                )
        except UserError as error:
            refusal = error
        self._owns_group = not dist.is_initialized()
        if self._owns_group:
            join(
                world, timedelta(seconds=max(1800.0, 2 * heartbeat_timeout, io_s + 600)), refusal=refusal
            )  # the watch is to speak before that time is over
        elif refusal is not None:
            raise refusal
        else:
            adopt()
        node_local = (self.plan.ds.raw.get("checkpoint") or {}).get("use_node_local_storage", False)
        in_charge = leaders(self.work_dir, world, node_local=node_local, ds_config=self.plan.ds.source)
        self._claimed = claim(self.work_dir, world, in_charge)
        if overwrite:
            set_aside(self.work_dir, in_charge, world.rank)
        self.checkpoints = Checkpoints(self.work_dir / "checkpoints", experiment.max_keep_ckpts, in_charge)
        self.checkpoints.tidy()
        self.state, self.stopped = TrainState(seed=seed, run=of_all_ranks(uuid.uuid4().hex)[0]), False
        hosts = of_all_ranks(socket.gethostname())
        start_logging(
            self.work_dir,
            level=experiment.log_level,
            is_main=world.is_main,
            header=environment_lines(seed, hosts),
        )
        sizes, warnings = size_lines(experiment, self.plan.crop)
        for warning in (*experiment.warnings, *warnings) if world.is_main else ():
            log.warning("config: %s", warning)
        for note in experiment.notes:
            log.info("config: %s", note)
        log.info("%s", sizes)
        for said in self.plan.warnings if world.is_main else ():
            log.warning(said)
        for note in self.plan.notes:
            log.info("%s", note)
        self._recomputation: Recomputation | Literal["config"] = "config"
        self._planner = Planner(experiment, self.plan.meta_model, crop=self.plan.crop)
        if world.is_main:
            room = (
                None
                if saves
                else "this run saves no checkpoint, not when it is asked to stop either (--no-save)"
            )
            for said in (
                shortfall(self._planner, self.plan.ds, world),
                room or no_room_to_save(self._planner, self.plan.ds, self.work_dir),
            ):
                if said:
                    log.warning(said)
        checkpoint = agree_to_resume(resume_from, self.plan.ds.stage, check=experiment.engine.checksums)
        self._may_go_back = resume == "auto"
        if checkpoint is None and resume is not None:
            log.info(
                "--resume auto: there is no checkpoint in %s yet, so this run starts at step 0",
                self.checkpoints.folder,
            )
        self.watch = Watch(world, hang_s=heartbeat_timeout, io_s=io_s)
        self.stop_requests = StopRequests(
            stop_file(self.work_dir) if world.is_main else None, self.watch, Launcher()
        )
        self.stop_requests.listen(training=False)
        try:
            with told_in_a_sentence():
                self._build(seed, checkpoint)
        except BaseException as error:
            self._give_up(error)
            raise
        self.watch.at(self.state.step, "idle")

    def _build(self, seed: int, checkpoint: ZeroCheckpoint | None) -> None:
        experiment, ds, device = self.plan.experiment, self.plan.ds, self.world.device
        self.compute_dtype = backbone_dtype(experiment.engine.backbone_dtype, device, ds.precision)
        self.heads_dtype = heads_dtype(experiment.engine.heads_dtype, self.plan.meta_model, ds.precision)
        log.info(
            "%d process%s on %s, ZeRO-%d, %s parameters, backbone computes in %s, heads in %s",
            self.world.size,
            "es" * (self.world.size > 1),
            device.type,
            ds.stage,
            *(
                str(dtype).removeprefix("torch.")
                for dtype in (ds.param_dtype, self.compute_dtype, self.heads_dtype)
            ),
        )
        log.info(
            "%d images per step = %d processes x %d images x %d accumulation steps",
            ds.global_batch,
            ds.world_size,
            ds.micro_batch,
            ds.accumulation,
        )
        set_fp32_matmul(experiment.engine.fp32_matmul, device)
        self._recomputation = recomputation = agreed_recomputation(
            self._planner, ds, self.world, self.compute_dtype
        )
        choose_recomputation(self.plan.meta_model, recomputation)
        self.meter = make_meter(
            experiment.engine.peak_tflops,
            self.plan.meta_model,
            self.plan.crop,
            self.world,
            self.compute_dtype,
        )
        torch.backends.cudnn.benchmark = (
            experiment.cudnn_benchmark and not torch.are_deterministic_algorithms_enabled()
        )

        def load_weights(model: torch.nn.Module) -> None:
            nonlocal checkpoint
            self.watch.mark()
            if checkpoint is not None:
                checkpoint = self._from_one_that_is_whole(
                    checkpoint, lambda each: load(model, fit_segmentor(model, weights_of(each)))
                )
            elif self.plan.weights is not None:
                load(model, self.plan.weights)
                self.plan = replace(self.plan, weights=None)  # an old file's tensors are in memory
            self.watch.mark()

        self.deepspeed = build_deepspeed_engine(
            experiment,
            ds,
            self.plan.meta_model,
            device,
            seed=seed,
            compute=self.compute_dtype,
            heads=self.heads_dtype,
            recomputation=recomputation,
            load_weights=load_weights,
        )
        self.watch.mark()
        note_failed_writes(self.deepspeed, background=experiment.engine.background_save)
        self.ema = (
            ShardedEma(self.deepspeed, experiment.engine.ema) if experiment.engine.ema is not None else None
        )
        if checkpoint is not None:
            checkpoint = self._from_one_that_is_whole(checkpoint, partial(self._restore, loaded=checkpoint))
            self.state = state_of(checkpoint, seed)
            if self.state.images != self.state.step * ds.global_batch:
                log.info(
                    "the checkpoint's run had another number of images per step: %g -> %d",
                    self.state.images / max(self.state.step, 1),
                    ds.global_batch,
                )
            if self.state.seed != seed:
                log.warning(
                    "the data order and the noise go on by seed %d of the checkpoint, not by %d",
                    self.state.seed,
                    seed,
                )
            if checkpoint.path.parent.resolve() == self.checkpoints.folder.resolve():
                self.checkpoints.newest = checkpoint.path.name
            self.checkpoints.recall_best(self.state, experiment.best_by)
            log.info(
                "resumed from %s (%d processes, ZeRO-%d): step %d, %d images seen",
                checkpoint.path,
                checkpoint.world_size,
                checkpoint.stage,
                self.state.step,
                self.state.images,
            )
        self.resumed_unscored = any(
            of_all_ranks(checkpoint is not None and not checkpoint.manifest.get("metrics"))
        )  # hosts may differ
        if self.world.is_main:
            for name, text in (
                ("config.py", self._config_text),
                ("ds_config.json", json.dumps(ds.raw, indent=4) + "\n"),
            ):
                with whole_file(self.work_dir / name) as file:
                    file.write(text.encode())

    def _restore(self, checkpoint: ZeroCheckpoint, loaded: ZeroCheckpoint) -> None:
        """Gives optimizer, schedule and average the state of `checkpoint`, and the module its weights, unless it has those of
        `loaded`. Collective; raises CheckpointError on every rank."""
        if checkpoint is not loaded:
            load(self.deepspeed.module, fit_segmentor(self.deepspeed.module, weights_of(checkpoint)))
        trouble: CheckpointError | None = None
        try:
            restore(self.deepspeed, checkpoint, self.plan.experiment.schedule)
            if self.ema is not None:
                self.ema.restore(checkpoint)
        except CheckpointError as error:
            trouble = error
        if troubles := [
            each for each in of_all_ranks(trouble and (type(trouble), str(trouble))) if each is not None
        ]:
            kind, said = troubles[0]
            raise kind(said)

    def _from_one_that_is_whole(
        self, checkpoint: ZeroCheckpoint, take_up: Callable[[ZeroCheckpoint], None]
    ) -> ZeroCheckpoint:
        """Calls `take_up` with the checkpoint, or, where that turns out to be damaged and the run may choose, with the newest one
        before it that is not; returns the one that it was. Collective."""
        check = self.plan.experiment.engine.checksums
        while True:
            try:
                take_up(checkpoint)
                return checkpoint
            except DamagedError as error:
                if not self._may_go_back:
                    raise
                damaged, checkpoint = checkpoint, one_before(checkpoint, self.plan.ds.stage, check=check)
                if checkpoint is None:
                    raise DamagedError(
                        f"{error}; no checkpoint before it in {damaged.path.parent} is whole"
                    ) from None
                if self.world.is_main:
                    log.warning("%s; going on from %s, the one before it", error, checkpoint.path)
                check_resumable(checkpoint.path, self.plan.meta_model, self._named_groups, check=check)

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
        """The experiment as one config file."""
        return config_text(self.plan.experiment.cfg._cfg_dict.to_dict())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms and accuracies of a micro-batch, as scalars; "loss" is the sum of the terms whose names hold "loss", as in mmseg.

        The noise of dropout and drop-path is drawn from (seed, stream position of the batch): a resumed run repeats it, and so does another split
        of the same micro-batches over ranks and accumulation steps.
        """
        torch.manual_seed(derived_seed(self.state.seed, "noise", batch.position))
        return loss_terms(self.deepspeed, batch.inputs)

    def train(self) -> TrainState:
        """Trains to the last step of the schedule, logging, saving and evaluating as the config says."""
        self.stop_requests.listen(
            training=True
        )  # until the end: what comes too late to be answered is no reason to end before the other ranks
        with told_in_a_sentence():
            state = train(self)
        self.watch.at(state.step, "idle")
        return state

    def evaluate(self, *, verbose: bool = True, stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """mmseg's metrics on the validation set with the weights as they are, or with their average (EMA) where the run keeps one.

        The data set is split over the ranks. Under ZeRO-3 each rank gathers the weights once, or they run in step: `engine.evaluation_weights`.
        stop: asked before each image; when it says so on some rank, all raise Abandoned.
        """
        if self.plan.val_set is None:
            raise ConfigError(
                "this engine was built with validate=False and has no validation set; build it with validate=True to evaluate"
            )
        experiment = self.plan.experiment
        ready = forwards(
            self.deepspeed.module,
            experiment.model,
            self.compute_dtype,
            self.world.device,
            heads=self.heads_dtype,
            autocast=self.plan.ds.precision == "autocast",
            weights=experiment.engine.evaluation_weights,
        )
        averaged = self.ema.in_place_of_weights() if self.ema is not None else nullcontext()
        with self.watch.during(self.state.step, "evaluating"), averaged, ready as segmentor:
            return evaluate_each(
                segmentor,
                self.plan.val_set,
                world=self.world,
                workers=experiment.workers,
                metrics=experiment.metrics,
                verbose=verbose,
                stop=lambda: self.watch.mark() or stop(),
            )

    def save(self) -> Path | None:
        """Writes a ZeRO checkpoint of this step into WORK_DIR/checkpoints; returns its directory, or None when it could not be written (a warning says why).

        With `engine.background_save` it returns sooner, and the checkpoint is published at a later log step, evaluation, save, or `close`.
        """
        dataset = self.plan.train_set
        meta = {
            "CLASSES": list(dataset.CLASSES),
            "PALETTE": [list(map(int, colour)) for colour in dataset.PALETTE],
            "config": self._config_text,
        }
        with self.watch.during(self.state.step, "saving"):
            return self.checkpoints.save(self.deepspeed, self.state, meta, self._named_groups, self.ema)

    def close(self) -> None:
        """Publishes a save that is still being written, frees the engine, and leaves the process group if this engine joined it."""
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
        """After an error: tells the other ranks of one that they may not know, publishes what is being saved, and leaves the group that this engine joined."""
        self.stop_requests.close(failed=True)
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note(after_out_of_memory(self._planner, self.plan.ds, self.world, self._recomputation))
        alone = of_one_rank(error)
        if alone is None:
            self.watch.at(self.state.step, "saving")
            self.checkpoints.finish()
        self.watch.close(alone)
        if self._owns_group:
            leave()
        self._claimed.close()  # whoever catches it may try again in this process
