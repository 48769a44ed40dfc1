"""The training loop, whole: next batch, forward, backward, step, log, maybe save, maybe stop, maybe evaluate.
What happens each step is visible here."""

import logging
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext

from internseg_ds.data.dataset_parts import SegmentationDataset
from internseg_ds.data.loading import Batch, training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.distributed.process_group import AnyRankFlags, gather_from_ranks
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.class_table import class_scores, extremes, write_class_scores
from internseg_ds.evaluation.evaluator import Abandoned, Evaluation
from internseg_ds.evaluation.kept_pictures import KeptEvaluation
from internseg_ds.evaluation.report import write_report
from internseg_ds.garbage_collection import SteppedCollector
from internseg_ds.monitoring.curves import draw_curves
from internseg_ds.monitoring.loggers import readable
from internseg_ds.monitoring.trackers.opening import pictures_asked_for
from internseg_ds.monitoring.units import SCORE, in_percent
from internseg_ds.output_files import unless_disk_full
from internseg_ds.progress import duration, stage
from internseg_ds.training.bad_images import BadImages
from internseg_ds.training.nonfinite_steps import NonfiniteSteps, nan_gradients_unless_finite
from internseg_ds.training.step_monitors import StepMonitors
from internseg_ds.training.train_state import TrainState, due
from internseg_ds.training.training_run import TrainingRun

log = logging.getLogger(__name__)


def train(run: TrainingRun) -> TrainState:
    """Trains `run` from where its state stands to the last step, or until some rank is asked to stop
    (`run.stopped`, after a save). Collective.

    Raises Diverged when too many steps in a row, or all of them, were skipped for a loss or gradient that is
    not finite, DataError when too many images are damaged, CheckpointError when there was no room for the
    last save.
    """
    plan, state, deepspeed = run.plan, run.state, run.deepspeed
    experiment, ds = plan.experiment, plan.ds
    start, last = state.step, experiment.max_steps
    has_val_set = plan.val_set is not None
    run.watch.at(start, "building")
    limits = experiment.engine
    bad_images = BadImages(run.work_dir / "data_faults.txt", limits.max_data_faults, start=start)
    skips = run.work_dir / "skipped_steps.jsonl"
    nonfinite = NonfiniteSteps(deepspeed, skips, limits.max_skipped_steps, start=start)
    # each step is saved before it is evaluated: a run that was interrupted in between left a checkpoint
    # without scores, which are made up for here
    evaluate_checkpoint = (
        has_val_set and run.resumed_unscored and due(start, experiment.evaluation.interval, last)
    )
    with (
        closing(_batches(run)) as batches,
        StepMonitors(run, scores_again=evaluate_checkpoint) as monitors,
        SteppedCollector() as garbage,
    ):
        with garbage.automatic():
            _before_the_first_step(run, monitors, evaluate_checkpoint=evaluate_checkpoint)
        monitors.restart()
        deepspeed.train()
        while state.step < last and not run.stopped:
            step = state.step + 1
            lr = max(deepspeed.lr_scheduler.get_last_lr())
            log_now = due(step, experiment.logging.interval, last)
            micro_batches = []
            with monitors.layer_times(measured=log_now), _named(first=step == start + 1):
                for number in range(ds.accumulation):
                    with monitors.data_wait(step, number):
                        batch = next(batches)
                    monitors.at(step, "forward", number)
                    losses = run.forward(batch)
                    monitors.at(step, "backward", number)
                    deepspeed.backward(nan_gradients_unless_finite(losses["loss"]))
                    monitors.add(losses)
                    bad_images.add(batch.faults)
                    micro_batches.append((losses["loss"].detach(), batch.files))
                    monitors.at(step, "update", number)
                    if number == ds.accumulation - 1:
                        # sent here, before DeepSpeed waits for the GPU once a step, and read after that, so
                        # that the exchange costs no wait of its own
                        own_flags = (run.stop_requests(), bool(bad_images.pending))
                        flags = AnyRankFlags(own_flags, run.world.device)
                    deepspeed.step()  # clips, updates and moves the schedule on the last micro-batch only
            monitors.at(step, "agreeing", ds.accumulation)
            skipped = nonfinite.after_step(step, micro_batches)
            monitors.end_step(None if skipped else deepspeed.get_global_grad_norm())
            if run.ema is not None and not skipped:
                run.ema.update()
            state.step = step
            state.images += ds.global_batch
            stop_now, any_bad_image = flags.result()  # the same on all ranks: all stop at this step, or none
            if any_bad_image:
                bad_images.share()

            # when every step so far was skipped, there is nothing to evaluate or to save
            has_learned = nonfinite.in_a_row < step
            evaluate_now = has_learned and has_val_set and due(step, experiment.evaluation.interval, last)
            # the best step can only be kept where each step that is evaluated is saved, too
            save_for_best = evaluate_now and experiment.evaluation.best_by is not None
            save_due = save_for_best or stop_now or due(step, experiment.checkpoints.interval, last)
            save_now = run.options.saves and has_learned and save_due
            if save_now or log_now:  # at each save too: a resumed run's records are those of an unbroken one
                monitors.record(step, lr, nonfinite.values(), logged=log_now)
                run.watch.at(step, "saving")
                run.checkpoints.finish(wait=False)  # a save that is written in the background
                monitors.restart()  # here: publishing that save is no training time
            pauses = save_now or evaluate_now
            with monitors.paused(step, pauses=pauses), garbage.after_step(pauses=pauses):
                if save_now:
                    run.save()  # before evaluating: an evaluation that dies costs no training
                if stop_now:
                    run.stopped = True
                elif evaluate_now:
                    evaluate_and_record(run, monitors)
                    deepspeed.train()
                    # asked to stop during the evaluation
                    if run.stopped and run.options.saves and not save_now:
                        run.save()
        run.watch.at(state.step, "saving")
        run.checkpoints.finish()
    _finish(run, nonfinite, start)
    return state


def _before_the_first_step(run: TrainingRun, monitors: StepMonitors, *, evaluate_checkpoint: bool) -> None:
    """Evaluates what a run starts from: where the config asks for it, or where a checkpoint never was."""
    start, experiment = run.state.step, run.plan.experiment
    if start >= experiment.max_steps:
        log.warning(
            "nothing is left to train: the checkpoint is of step %d, and runner.max_iters is %d; raise it, "
            "or start anew in another --work-dir",
            start,
            experiment.max_steps,
        )
    if run.plan.val_set is not None and start == 0 and experiment.engine.evaluate_before:
        evaluate_and_record(run, monitors, of_checkpoint=False)
    if evaluate_checkpoint:
        evaluate_and_record(run, monitors)


def _named(*, first: bool) -> AbstractContextManager[None]:
    """Around a step: the first one starts data workers, compiles and takes memory, and says so."""
    return stage("first step (it starts data workers, compiles and takes memory)") if first else nullcontext()


def _batches(run: TrainingRun) -> Generator[Batch, None, None]:
    """This rank's micro-batches from where the state stands, without end."""
    plan, state, world = run.plan, run.state, run.world
    sampler = GlobalBatchSampler(
        len(plan.train_set),
        plan.ds.micro_batch,
        rank=world.rank,
        world_size=world.size,
        seed=state.seed,
        start=state.images,
    )
    workers = plan.experiment.workers
    return training_batches(plan.train_set, sampler, workers=workers, seed=state.seed, device=world.device)


def _finish(run: TrainingRun, nonfinite: NonfiniteSteps, start: int) -> None:
    """Draws the curves, and says how the training ended. Raises Diverged and CheckpointError as `train`
    does."""
    state, experiment, newest = run.state, run.plan.experiment, run.checkpoints.newest
    earlier = "the newest checkpoint that was there before, if any"
    if run.stopped:
        goes_on = (newest if run.options.saves else earlier) or "its beginning"
        # of every rank: rank 0, which writes the log, is often not the one that was asked
        reasons = [reason for reason in gather_from_ranks(run.stop_requests.reason) if reason]
        why = reasons[0] if reasons else "as asked to"
        log.info("stopped at step %d: %s; --resume auto goes on from %s", state.step, why, goes_on)
    if run.world.is_main:
        records = run.work_dir / "metrics.jsonl"
        with unless_disk_full("the curves are not drawn"):
            draw_curves(records, run.work_dir / "curves.png", experiment.evaluation.metrics[0])
    if run.stopped:
        return
    nonfinite.at_end(state.step)
    best = "" if state.best is None else f"; {_best(run)}"
    log.info("trained to step %d%s; %s", state.step, best, run.work_dir / "report.html")
    if run.options.saves and state.step > start and newest != f"iter_{state.step}":
        raise CheckpointError(
            f"the training is done but its last step, {state.step}, could not be saved (the log says why); "
            f"make room in {run.checkpoints.folder} and start it again with --resume auto, which goes on "
            f"from {newest or earlier}"
        )


def evaluate_and_record(run: TrainingRun, monitors: StepMonitors, *, of_checkpoint: bool = True) -> None:
    """Evaluates and records the scores; sets `run.stopped` when a request to stop comes meanwhile.
    Collective.

    of_checkpoint: whether the scores are those of the checkpoint of this step, which is marked when it is the
    best so far, of which WORK_DIR/evaluation has a report; False before the first step.
    """
    state, experiment, began = run.state, run.plan.experiment, time.monotonic()
    kept = KeptEvaluation(pictures_asked_for(experiment.logging.hooks))
    try:
        evaluation = run.evaluate(verbose=False, stop=run.stop_requests, observers_of=kept.observers)
    except Abandoned:
        run.stopped = True
        return
    metrics = evaluation.metrics
    monitors.write(state.step, metrics)
    monitors.keep(kept.record(state.step, evaluation, run.plan.val_set, run.world))
    seconds = time.monotonic() - began
    if not of_checkpoint:
        _tell(run, evaluation, "before training", seconds)
        return
    run.watch.at(state.step, "saving")
    best = run.checkpoints.score(state, metrics, experiment.evaluation.best_by)
    _tell(run, evaluation, _place(run, best=best), seconds)
    if run.world.is_main and (best or experiment.evaluation.best_by is None or not run.options.saves):
        with unless_disk_full("the report of this score is not written"):
            val_set: SegmentationDataset = run.plan.val_set
            write_report(evaluation, val_set.CLASSES, run.work_dir / "evaluation")


def _place(run: TrainingRun, *, best: bool) -> str:
    """How a score stands among those of this run."""
    if best:
        return "best so far"
    return "" if run.state.best is None else _best(run)


def _best(run: TrainingRun) -> str:
    state = run.state
    return (
        f"best {run.plan.experiment.evaluation.best_by} {100 * (state.best or 0.0):.2f} % of {state.best_tag}"
    )


def _tell(run: TrainingRun, evaluation: Evaluation, place: str, seconds: float) -> None:
    """Logs the scores in a line, and the best and worst classes; all of them go into a file."""
    if not run.world.is_main:
        return
    names = filter(SCORE.fullmatch, evaluation.metrics)
    first = run.plan.experiment.evaluation.metrics[0]
    scores = {name: evaluation.metrics[name] for name in sorted(names, key=lambda name: name != first)}
    words = ", ".join(f"{name} {readable(name, value)}" for name, value in in_percent(scores).items())
    log.info(
        "step %d: %s%s; %d images in %s",
        run.state.step,
        words,
        f" ({place})" if place else "",
        evaluation.images,
        duration(seconds),
    )
    val_set: SegmentationDataset = run.plan.val_set
    by_class = class_scores(evaluation.metrics, evaluation.confusion, val_set.CLASSES)
    log.info("  %s", extremes(by_class))
    with unless_disk_full("the scores by class are not written"):
        write_class_scores(by_class, run.work_dir / "per_class.csv")
