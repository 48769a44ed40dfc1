"""What is measured of the steps of a training and written into its records. Changes nothing about them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

from torch import Tensor

from internseg_ds.config.config_text import config_dict
from internseg_ds.distributed.hang_verdict import Doing
from internseg_ds.monitoring.evaluation_record import FOLDER, EvaluationRecord, rewind_evaluations
from internseg_ds.monitoring.loggers import MetricLogger, open_loggers
from internseg_ds.monitoring.profiler import StepProfile
from internseg_ds.monitoring.run_starts import read_starts
from internseg_ds.monitoring.step_metrics import Spikes, StepMetrics
from internseg_ds.monitoring.stragglers import LayerClock, Stragglers
from internseg_ds.monitoring.trackers.best import best_recorded
from internseg_ds.monitoring.trackers.opening import Trackers, open_trackers
from internseg_ds.monitoring.trackers.tracker import RunInfo
from internseg_ds.monitoring.units import in_percent
from internseg_ds.output_files import unless_disk_full
from internseg_ds.run_report.refreshed_page import RefreshedPage
from internseg_ds.training.training_run import TrainingRun


def record(loggers: Sequence[MetricLogger], step: int, values: Mapping[str, float]) -> None:
    """Writes a record of a step, in the units of `units`; one that a full disk does not take waits in memory."""
    for logger in loggers:
        with unless_disk_full(f"a record of step {step} is not written yet"):
            logger.write(step, values)


def trackers_of(run: TrainingRun) -> AbstractContextManager[Trackers]:
    """Those that the config asks for. By rank 0, after the records of steps that it repeats were taken away."""
    experiment, starts = run.plan.experiment, read_starts(run.work_dir)
    info = RunInfo(
        run=run.state.run,
        name=run.work_dir.resolve().name,
        work_dir=run.work_dir,
        start=run.state.step,
        config=config_dict(experiment.cfg),
        ds_config=run.plan.ds.raw,
        environment=starts[-1].environment if starts else (),
    )
    score = experiment.evaluation.best_by or experiment.evaluation.metrics[0]
    best = best_recorded(run.work_dir / "metrics.jsonl", score) if info.start else None
    return open_trackers(experiment.logging.hooks, info, score=score, best=best)


class StepMonitors:
    """Those of one training; a `with` block around the loop opens the records and the profile, and closes
    them. Every rank makes the same calls."""

    def __init__(self, run: TrainingRun, *, scores_again: bool) -> None:
        """scores_again: whether the checkpoint that the run goes on from is evaluated first, so that an
        earlier score of its step gives way."""
        self._run, self._scores_again = run, scores_again
        experiment, world = run.plan.experiment, run.world
        self._metrics = StepMetrics()
        self._spikes = Spikes()
        self._stragglers = Stragglers(experiment.workers)
        self._clock = LayerClock(run.deepspeed.module, world.device)
        self._profile = StepProfile(
            run.work_dir / "profile",
            run.options.profiled_steps,
            run.deepspeed.module,
            world,
            run.watch,
            start=run.state.step,
            last=experiment.max_steps,
        )
        self._page = RefreshedPage(run.work_dir) if world.is_main else None
        self._loggers: list[MetricLogger] = []
        self._trackers = Trackers()
        self._newest_save = run.checkpoints.newest
        self._opened = ExitStack()

    def __enter__(self) -> "StepMonitors":
        run, experiment = self._run, self._run.plan.experiment
        loggers = open_loggers(
            run.work_dir,
            max_steps=experiment.max_steps,
            start=run.state.step,
            is_main=run.world.is_main,
            scores_again=self._scores_again,
        )
        if run.world.is_main:
            with unless_disk_full("records of later evaluations stay where they are"):
                rewind_evaluations(run.work_dir / FOLDER, run.state.step)
        with ExitStack() as opened:
            if self._page is not None:
                opened.callback(self._page.close)  # the last thing: it reads what the others have written
            self._loggers = opened.enter_context(loggers)
            if run.world.is_main:
                self._trackers = opened.enter_context(trackers_of(run))
            opened.enter_context(self._profile)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def restart(self) -> None:
        """Measures anew from here, after a record, or after what was no training step."""
        self._metrics = StepMetrics()

    def at(self, step: int, doing: Doing, micro_batch: int = 0) -> None:
        """This rank has come to this part of this step; the watchdog hears of it, too."""
        self._profile.at(step, doing, micro_batch)

    @contextmanager
    def data_wait(self, step: int, micro_batch: int) -> Iterator[None]:
        """Around the wait for a micro-batch."""
        self.at(step, "data", micro_batch)
        with self._metrics.waiting():
            yield

    @contextmanager
    def layer_times(self, *, measured: bool) -> Iterator[None]:
        """Around a step, whose layers are timed where it is logged: timing each step would slow them."""
        if not measured:
            yield
            return
        with self._clock:
            yield

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """The loss terms of a micro-batch (scalars)."""
        self._metrics.add(losses)

    def end_step(self, grad_norm: Tensor | float | None) -> None:
        """grad_norm: before clipping; None of a step that was skipped."""
        self._metrics.end_step(grad_norm)

    def record(self, step: int, lr: float, extra: Mapping[str, float], *, logged: bool) -> None:
        """Writes what was measured since `restart`. Collective: one all-reduce, and one transfer from the device.

        extra: further values. logged: whether this is a step that the config wants logged; a record beside
        those leaves out what needs the times of layers.
        """
        run, metrics = self._run, self._metrics
        steps = len(metrics.losses)
        own = (metrics.waited_s / steps, self._clock.seconds) if logged else ()
        values, losses, of_ranks = metrics.means_over_ranks(own)
        images = metrics.micro_batches * run.plan.ds.micro_batch * run.world.size
        values |= {"lr": lr, **run.meter.values(metrics, images)}
        values |= self._spikes.among(losses, step)
        values |= extra
        if logged:
            values |= self._stragglers.values(of_ranks, metrics.seconds / steps)
        self.write(step, values)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a record of other values, such as scores. values: scores and shares from 0 to 1."""
        values = in_percent(values)
        record(self._loggers, step, values)
        self._trackers.record(step, values)

    def keep(self, evaluation: EvaluationRecord | None) -> None:
        """Writes the record of an evaluation; None on ranks that have none."""
        if evaluation is not None:
            self.tell_of_save()
            self._trackers.evaluation(evaluation)
            with unless_disk_full("the record of this evaluation is not written"):
                evaluation.write(self._run.work_dir / FOLDER)

    def tell_of_save(self) -> None:
        """Tells the trackers of a save that was completed since the last call."""
        checkpoints = self._run.checkpoints
        if checkpoints.newest not in (None, self._newest_save):
            self._newest_save = checkpoints.newest
            folder = checkpoints.folder / checkpoints.newest
            self._trackers.checkpoint(int(checkpoints.newest.rpartition("_")[2]), folder)

    @contextmanager
    def paused(self, step: int, *, pauses: bool) -> Iterator[None]:
        """Around what comes after a step: its time is not the training's. pauses: whether a save or an
        evaluation comes."""
        with self._metrics.paused():
            self._profile.end_step(step, pauses=pauses)
            if pauses:
                # an evaluation forks processes, and no thread of ours may be at work then
                self._trackers.settle()
                if self._page is not None:
                    self._page.wait()
            yield
            self.tell_of_save()
            if pauses and self._page is not None:
                self._page.refresh()
