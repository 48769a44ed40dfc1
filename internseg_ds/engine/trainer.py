"""The training loop, whole: next batch, forward, backward, step, log, maybe save, maybe evaluate. What happens each step is visible here."""

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from internseg_ds.data.loading import training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.distributed.process_group import of_all_ranks
from internseg_ds.engine.curves import draw_curves
from internseg_ds.engine.report import write_report
from internseg_ds.engine.state import TrainState, due
from internseg_ds.engine.trackers import Tracker, open_trackers
from internseg_ds.errors import OutputError

if TYPE_CHECKING:
    from internseg_ds.engine.segmentor_engine import SegmentorEngine

log = logging.getLogger(__name__)

PATIENCE = 10
"""Updates in a row that may be skipped for a gradient that is not finite."""


class Diverged(RuntimeError):
    """The loss or the gradient is not finite any more."""


def train(engine: "SegmentorEngine") -> TrainState:
    """Trains `engine` from where its state stands to the last step. Collective.

    Raises Diverged when a loss is not finite, or PATIENCE gradients in a row are not.
    """
    plan, state = engine.plan, engine.state
    experiment, ds, world = plan.experiment, plan.ds, engine.world
    last = experiment.max_steps
    sampler = GlobalBatchSampler(len(plan.train_set), ds.micro_batch, rank=world.rank, world_size=world.size, seed=state.seed, start=state.images)
    batches = training_batches(plan.train_set, sampler, workers=experiment.workers, seed=state.seed, device=world.device)
    with open_trackers(engine.work_dir, experiment.log_hooks, max_steps=last, start=state.step, config=experiment.cfg._cfg_dict.to_dict(),
                       is_main=world.is_main) as trackers:
        if plan.val_set is not None and state.step == 0 and experiment.engine.evaluate_before:
            record(trackers, 0, engine.evaluate(verbose=False).metrics)
        if plan.val_set is not None and engine.resumed_unscored and due(state.step, experiment.evaluate_every, last):
            score(engine, trackers)                           # the run was interrupted between save and evaluation
        means, skipped_in_a_row = RunningMeans(), 0
        engine.deepspeed.train()
        while state.step < last:
            lr, skipped = max(engine.deepspeed.get_lr()), engine.deepspeed.skipped_steps
            for _ in range(ds.accumulation):                  # micro-batches of one optimizer step
                waited = time.perf_counter()
                batch = next(batches)
                means.waited_s += time.perf_counter() - waited
                losses = engine.forward(batch)
                engine.deepspeed.backward(losses["loss"])
                engine.deepspeed.step()                       # DeepSpeed clips, updates and moves the schedule on the last micro-batch only
                means.add(losses, batch.files)
            if engine.ema is not None:
                engine.ema.update()
            state.step += 1
            state.images += ds.global_batch
            skipped_in_a_row = skipped_in_a_row + 1 if engine.deepspeed.skipped_steps > skipped else 0
            if skipped_in_a_row:
                log.warning("step %d: the gradient is not finite, so DeepSpeed skipped the update (%d in a row)", state.step, skipped_in_a_row)

            scored = plan.val_set is not None and due(state.step, experiment.evaluate_every, last)
            saved = due(state.step, experiment.save_every, last) or (scored and experiment.best_by is not None)
            if saved or due(state.step, experiment.log_every, last):  # at each save too, so that a resumed run's records are those of an unbroken one
                values = means.of_all_ranks()                 # collective, so every rank stops alike on a loss that is not finite
                values |= {"lr": lr, "grad_norm": float(engine.deepspeed.get_global_grad_norm() or 0.0)}
                values["images_per_s"] = means.count * ds.micro_batch * world.size / means.seconds
                values["data_wait"] = means.waited_s / means.seconds
                if world.device.type == "cuda":
                    values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                record(trackers, state.step, values)
                engine.checkpoints.finish(wait=False)         # a save that is written in the background
                if not math.isfinite(values["loss"]):
                    raise Diverged(f"the loss is not finite at step {state.step}; it was not for these images: {means.not_finite()}")
                means = RunningMeans()
            if skipped_in_a_row == PATIENCE:
                raise Diverged(f"the gradients of the last {PATIENCE} steps, up to step {state.step}, were not finite; lower the learning rate, or clip the gradients "
                               "with optimizer_config=dict(grad_clip=dict(max_norm=...))")
            means.pause()
            if saved:
                engine.save()                                 # before evaluating: an evaluation that dies costs no training
            if scored:
                score(engine, trackers)
                engine.deepspeed.train()
            means.resume()
    engine.checkpoints.finish()
    if world.is_main:
        draw_curves(engine.work_dir / "metrics.jsonl", engine.work_dir / "curves.png", experiment.metrics[0])
    return state


def score(engine: "SegmentorEngine", trackers: list[Tracker]) -> None:
    """Evaluates, records the scores, and marks the checkpoint of this step when it is the best so far, of which WORK_DIR/evaluation tells. Collective."""
    state, experiment = engine.state, engine.plan.experiment
    evaluation = engine.evaluate()
    metrics = evaluation.metrics
    best = engine.checkpoints.score(state, metrics, experiment.best_by)
    log.info("step %d: %s %.2f%s", state.step, experiment.metrics[0], 100 * metrics[experiment.metrics[0]], " (best so far)" * best)
    record(trackers, state.step, metrics)
    if engine.world.is_main and (best or experiment.best_by is None):
        try:
            write_report(evaluation, engine.plan.val_set.CLASSES, engine.work_dir / "evaluation")
        except OutputError as error:
            log.warning("%s; the training goes on", error)


def record(trackers: list[Tracker], step: int, values: Mapping[str, float]) -> None:
    for tracker in trackers:
        tracker.write(step, values)


class RunningMeans:
    """Means of loss terms since the last log record, kept on the device so that adding never waits for it, and the time that they took."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        """Micro-batches added."""
        self.finite: list[tuple[Tensor, list[str]]] = []
        """Of each micro-batch: whether its loss was finite, and its image files."""
        self.waited_s = 0.0
        """Seconds that the loop waited for data."""
        self._spent_s, self._began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds spent on training since the start: what lies between `pause` and `resume` (saving, evaluating) left out."""
        return self._spent_s + time.perf_counter() - self._began

    def pause(self) -> None:
        self._spent_s = self.seconds

    def resume(self) -> None:
        self._began = time.perf_counter()

    def add(self, losses: Mapping[str, Tensor], files: list[str]) -> None:
        self.finite.append((losses["loss"].detach().isfinite(), files))
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()
        self.count += 1

    def of_all_ranks(self) -> dict[str, float]:
        """Means over micro-batches and ranks. Collective: one all-reduce."""
        names = sorted(self.sums)
        stacked = torch.stack([self.sums[name] for name in names]) / self.count
        dist.all_reduce(stacked)
        return dict(zip(names, (stacked / dist.get_world_size()).tolist(), strict=True))

    def not_finite(self) -> str:
        """The image files of the micro-batches whose loss was not finite, by rank. Collective."""
        mine = [file for finite, files in self.finite if not finite for file in files]
        return "; ".join(f"rank {rank}: {', '.join(files)}" for rank, files in enumerate(of_all_ranks(mine)) if files)
