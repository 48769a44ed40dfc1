"""What a run is asked for beside its config and its ds_config: the options of launch/train.py."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from internseg_ds.config.experiment import Experiment
from internseg_ds.distributed.watchdog import check_heartbeat_timeout
from internseg_ds.monitoring.profiler import check_profiled_steps

LEAST_COLLECTIVE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class RunOptions:
    """Filled in from the experiment, where a run does not say otherwise (`resolve`).

    work_dir: where checkpoints, records and logs go.
    seed: of data order, augmentation, initial weights and noise.
    load_from: weights of a whole segmentor to start from; None: those that the config names.
    resume: None, "auto" (the newest checkpoint of work_dir, if there is one), or the path of a checkpoint.
    validate: whether the validation set is evaluated.
    saves: whether the training writes checkpoints.
    overwrite: whether an earlier run in work_dir is moved into a folder beside it.
    heartbeat_timeout: seconds without progress on any rank that end the run; 0: no limit.
    profiled_steps: how many steps are recorded with torch.profiler.
    """

    work_dir: Path
    seed: int
    load_from: str | os.PathLike | None = None
    resume: str | os.PathLike | None = None
    validate: bool = True
    saves: bool = True
    overwrite: bool = False
    heartbeat_timeout: float = 600.0
    profiled_steps: int = 0

    @classmethod
    def resolve(
        cls,
        experiment: Experiment,
        *,
        work_dir: str | os.PathLike | None,
        seed: int | None,
        resume: str | os.PathLike | None,
        **others: object,
    ) -> "RunOptions":
        """None stands for what the experiment says. Raises ConfigError for a timeout or a number of profiled
        steps that cannot be meant."""
        options = cls(
            work_dir=Path(work_dir) if work_dir else experiment.work_dir,
            seed=experiment.seed if seed is None else seed,
            resume=resume or experiment.resume_from,
            **others,  # type: ignore[arg-type]  # of the constructor's own fields
        )
        check_heartbeat_timeout(options.heartbeat_timeout)
        check_profiled_steps(options.profiled_steps)
        return options

    @property
    def may_go_back(self) -> bool:
        """Whether a damaged checkpoint may be passed over for the one before it."""
        return self.resume == "auto"

    def collective_timeout(self, io_timeout: float) -> timedelta:
        """Of torch.distributed's collectives: longer than the watchdog's limits, which say more about a
        hang."""
        return timedelta(
            seconds=max(LEAST_COLLECTIVE_TIMEOUT_S, 2 * self.heartbeat_timeout, io_timeout + 600)
        )
