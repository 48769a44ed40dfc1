"""The training loop, whole: next batch, forward, backward, step, log, maybe save, maybe stop, maybe evaluate. What happens each step is visible here."""

import logging
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from internseg_ds.data.loading import training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.distributed.process_group import Vote
from internseg_ds.engine.curves import draw_curves
from internseg_ds.engine.data_faults import DataFaults
from internseg_ds.engine.evaluator import Abandoned
from internseg_ds.engine.interval import Interval, Spikes
from internseg_ds.engine.outputs import unless_disk_full
from internseg_ds.engine.profiling import StepProfile
from internseg_ds.engine.report import write_report
from internseg_ds.engine.skipped import SkippedSteps, poisoned
from internseg_ds.engine.state import TrainState, due
from internseg_ds.engine.stopping import StopRequests
from internseg_ds.engine.stragglers import LayerClock, Stragglers
from internseg_ds.engine.trackers import Tracker, open_trackers
from internseg_ds.errors import CheckpointError

if TYPE_CHECKING:
    from internseg_ds.engine.segmentor_engine import SegmentorEngine

log = logging.getLogger(__name__)


def train(engine: "SegmentorEngine") -> TrainState:
    """Trains `engine` from where its state stands to the last step, or until some rank is asked to stop (`engine.stopped`, after a save). Collective.

    Raises Diverged when too many steps in a row, or all of them, were skipped for a loss or gradient that is not finite, DataError when too many images
    are damaged, CheckpointError when there was no room for the last save.
    """
    plan, state, watch, stop = engine.plan, engine.state, engine.watch, engine.stop_requests
    experiment, ds, world, deepspeed = plan.experiment, plan.ds, engine.world, engine.deepspeed
    start, last, evaluates = state.step, experiment.max_steps, plan.val_set is not None
    watch.at(state.step, "building")
    if state.step >= last:
        log.warning(
            "nothing is left to train: the checkpoint is of step %d, and runner.max_iters is %d; raise it, or start anew in another --work-dir",
            state.step,
            last,
        )
    sampler = GlobalBatchSampler(
        len(plan.train_set),
        ds.micro_batch,
        rank=world.rank,
        world_size=world.size,
        seed=state.seed,
        start=state.images,
    )
    faults = DataFaults(
        engine.work_dir / "data_faults.txt", experiment.engine.max_data_faults, start=state.step
    )
    skipped = SkippedSteps(
        deepspeed,
        engine.work_dir / "skipped_steps.jsonl",
        experiment.engine.max_skipped_steps,
        start=state.step,
    )
    clock, stragglers, spikes = (
        LayerClock(deepspeed.module, world.device),
        Stragglers(experiment.workers),
        Spikes(),
    )
    profile = StepProfile(
        engine.work_dir / "profile",
        engine.profiled_steps,
        deepspeed.module,
        world,
        watch,
        start=state.step,
        last=last,
    )
    score_first = evaluates and engine.resumed_unscored and due(state.step, experiment.evaluate_every, last)
    with (
        open_trackers(
            engine.work_dir,
            experiment.log_hooks,
            max_steps=last,
            start=state.step,
            config=experiment.cfg._cfg_dict.to_dict(),
            is_main=world.is_main,
            scores_again=score_first,
        ) as trackers,
        closing(
            training_batches(
                plan.train_set, sampler, workers=experiment.workers, seed=state.seed, device=world.device
            )
        ) as batches,
        profile,
    ):
        if evaluates and state.step == 0 and experiment.engine.evaluate_before:
            evaluate(engine, trackers, stop)
        if score_first:
            evaluate(
                engine, trackers, stop, scored=True
            )  # the run was interrupted between save and evaluation
        interval = Interval()
        deepspeed.train()
        while state.step < last and not engine.stopped:
            step, lr = state.step + 1, max(deepspeed.lr_scheduler.get_last_lr())
            logged, micro_batches = due(step, experiment.log_every, last), []
            with clock if logged else nullcontext():
                for micro_batch in range(ds.accumulation):  # of one optimizer step
                    profile.at(step, "data", micro_batch)
                    with interval.waiting():
                        batch = next(batches)
                    profile.at(step, "forward", micro_batch)
                    losses = engine.forward(batch)
                    profile.at(step, "backward", micro_batch)
                    deepspeed.backward(poisoned(losses["loss"]))
                    interval.add(losses)
                    faults.add(batch.faults)
                    micro_batches.append((losses["loss"].detach(), batch.files))
                    profile.at(step, "update", micro_batch)
                    if (
                        micro_batch == ds.accumulation - 1
                    ):  # told before DeepSpeed waits for the GPU once a step, read after that: no wait of its own
                        vote = Vote((stop(), bool(faults.pending)), world.device)
                    deepspeed.step()  # DeepSpeed clips, updates and moves the schedule on the last micro-batch only
            profile.at(step, "agreeing", ds.accumulation)
            if skipped.after_step(step, micro_batches):
                interval.end_step(None)
            else:
                interval.end_step(deepspeed.get_global_grad_norm())
                if engine.ema is not None:
                    engine.ema.update()
            state.step = step
            state.images += ds.global_batch
            stopping, faulty = vote.result()  # all ranks stop at the same step, or none
            if faulty:
                faults.share()

            learnt = (
                skipped.in_a_row < step
            )  # some step was not skipped: there is something to score and save
            scored = learnt and evaluates and due(step, experiment.evaluate_every, last)
            saved = (
                engine.saves
                and learnt
                and (
                    stopping
                    or due(step, experiment.save_every, last)
                    or (scored and experiment.best_by is not None)
                )
            )
            if (
                saved or logged
            ):  # at each save too, so that a resumed run's records are those of an unbroken one
                values, step_losses = interval.of_all_ranks()
                values |= {
                    "lr": lr,
                    **engine.meter.values(interval, interval.micro_batches * ds.micro_batch * world.size),
                }
                values |= spikes.among(step_losses, step) | skipped.values()
                if logged:
                    values |= stragglers.values(interval, clock.seconds)
                record(trackers, step, values)
                watch.at(step, "saving")
                engine.checkpoints.finish(wait=False)  # a save that is written in the background
                interval = Interval()
            with interval.paused():
                profile.end_step(step, pauses=saved or scored)
                if saved:
                    engine.save()  # before evaluating: an evaluation that dies costs no training
                if stopping:
                    engine.stopped = True
                elif scored:
                    evaluate(engine, trackers, stop, scored=True)
                    deepspeed.train()
                    if engine.stopped and engine.saves and not saved:
                        engine.save()
        watch.at(state.step, "saving")
        engine.checkpoints.finish()
    if engine.stopped:
        log.info(
            "stopped at step %d, as asked to; --resume auto goes on from %s",
            state.step,
            (
                engine.checkpoints.newest
                if engine.saves
                else "the newest checkpoint that was there before, if any"
            )
            or "its beginning",
        )
    if world.is_main:
        with unless_disk_full("the curves are not drawn"):
            draw_curves(
                engine.work_dir / "metrics.jsonl", engine.work_dir / "curves.png", experiment.metrics[0]
            )
    if not engine.stopped:
        skipped.at_end(state.step)
        if engine.saves and state.step > start and engine.checkpoints.newest != f"iter_{state.step}":
            raise CheckpointError(
                f"the training is done but its last step, {state.step}, could not be saved (the log says why); make room in "
                f"{engine.checkpoints.folder} and start it again with --resume auto, which goes on from "
                f"{engine.checkpoints.newest or 'the newest checkpoint that was there before, if any'}"
            )
    return state


def evaluate(
    engine: "SegmentorEngine", trackers: list[Tracker], stop: StopRequests, *, scored: bool = False
) -> None:
    """Evaluates and records the scores; sets `engine.stopped` when a request to stop comes meanwhile. Collective.

    scored: marks the checkpoint of this step when it is the best so far, of which WORK_DIR/evaluation tells.
    """
    state, experiment = engine.state, engine.plan.experiment
    try:
        evaluation = engine.evaluate(verbose=scored, stop=stop)
    except Abandoned:
        engine.stopped = True
        return
    metrics = evaluation.metrics
    record(trackers, state.step, metrics)
    if not scored:
        return
    engine.watch.at(state.step, "saving")
    best = engine.checkpoints.score(state, metrics, experiment.best_by)
    log.info(
        "step %d: %s %.2f%s",
        state.step,
        experiment.metrics[0],
        100 * metrics[experiment.metrics[0]],
        " (best so far)" * best,
    )
    if engine.world.is_main and (best or experiment.best_by is None or not engine.saves):
        with unless_disk_full("the report of this score is not written"):
            write_report(evaluation, engine.plan.val_set.CLASSES, engine.work_dir / "evaluation")


def record(trackers: list[Tracker], step: int, values: Mapping[str, float]) -> None:
    for tracker in trackers:
        with unless_disk_full(f"a record of step {step} is not written yet"):
            tracker.write(step, values)
