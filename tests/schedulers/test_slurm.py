"""The Slurm scripts under a real Slurm of one node, with two ranks on CPUs."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.schedulers.conftest import STEPS, steps_of
from tests.schedulers.runs import wait_for
from tests.schedulers.slurm import Cluster, cluster

pytestmark = pytest.mark.multinode
CPUS = {"GPUS": "2", "CPUS_PER_TASK": "1", "GRES": ""}


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    try:
        with cluster(folder) as made:
            yield made
    finally:
        shutil.rmtree(folder)


FAKE = """
import os, signal, sys, time
from pathlib import Path
rank, start = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
print("rank", rank, "of", os.environ["SLURM_NTASKS"], "start", start, *sys.argv[1:], flush=True)
if "--apart" in sys.argv:
    if rank == "0":
        sys.exit(int(sys.argv[-1]))
    time.sleep(4)
    sys.exit(75)
if start == "1":
    sys.exit(int(os.environ.get("SECOND_CODE", 0)))
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
signal.signal(signal.SIGTERM, lambda *_: (print("rank", rank, "terminated", flush=True), os._exit(75)))
time.sleep(120)
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """The Slurm scripts, beside a train.py that stands in for a training which saves and stops at once."""
    (tmp_path / "launch").mkdir()
    for script in ("slurm_train.sh", "slurm_test.sh"):
        shutil.copy(ROOT / "launch" / script, tmp_path / "launch")
    (tmp_path / "launch" / "train.py").write_text(FAKE)
    (tmp_path / "launch" / "test.py").write_text(FAKE)
    return tmp_path


def submit(slurm: Cluster, cwd: Path, *arguments: object, **env: str) -> tuple[str, Path]:
    """(job's number, its log) of launch/slurm_train.sh as a batch job."""
    said = slurm.run(
        "sh", "launch/slurm_train.sh", "tests", "job", *arguments, cwd=cwd, BATCH="1", **{**CPUS, **env}
    ).stdout
    job = said.split()[-1]
    log = Path(slurm.run("scontrol", "show", "job", job, cwd=cwd).stdout.partition("StdOut=")[2].split()[0])
    return job, log


def wait_for_words(log: Path, words: str, *, timeout_s: float = 60) -> None:
    wait_for(
        lambda: log.exists() and words in log.read_text(),
        words,
        timeout_s=timeout_s,
        output=lambda: log.read_text() if log.exists() else "",
    )


def test_srun_gives_every_task_its_rank_and_passes_options_and_the_exit_code_on(slurm, project):
    done = slurm.run(
        "sh",
        "launch/slurm_test.sh",
        "tests",
        "job",
        "cfg.py",
        "w.pth",
        "--eval",
        "mIoU",
        cwd=project,
        SLURM_RESTART_COUNT="1",
        SECOND_CODE="3",
        check=False,
        **CPUS,
    )
    assert (
        sorted(done.stdout.splitlines())
        == [f"rank {rank} of 2 start 1 cfg.py w.pth --eval mIoU" for rank in (0, 1)]
        and done.returncode == 3
    )


@pytest.mark.parametrize(("first", "wait_s", "code"), [(75, 60, 75), (1, 1, 137)])
def test_ranks_that_end_one_after_the_other_have_time_for_it_and_hanging_ones_are_ended(
    first, wait_s, code, slurm, project
):
    done = slurm.run(
        "sh",
        "launch/slurm_train.sh",
        "tests",
        "job",
        "cfg.py",
        "--apart",
        first,
        cwd=project,
        check=False,
        SRUN_ARGS=f"--wait={wait_s}",
        **CPUS,
    )
    assert done.returncode == code, done.stderr


def test_a_batch_job_that_is_told_to_save_goes_back_into_the_queue_and_resumes(slurm, project):
    job, log = submit(slurm, project, "cfg.py", "--seed", 1)
    wait_for_words(log, "rank 1 of 2 start 0 cfg.py --resume auto --seed 1")
    slurm.run("scancel", "--signal=USR1", job, cwd=project)
    wait_for_words(log, "rank 1 of 2 start 1 cfg.py --resume auto --seed 1")
    wait_for(lambda: slurm.state(job) == "COMPLETED", "end of the job", timeout_s=30)


def test_a_job_is_not_requeued_when_the_work_directory_holds_a_stop_file(slurm, project):
    job, log = submit(slurm, project, "cfg.py", "--work-dir", project / "run")
    wait_for_words(log, "rank 1 of 2 start 0")
    (project / "run").mkdir()
    (project / "run" / "STOP").touch()
    slurm.run("scancel", "--signal=USR1", job, cwd=project)
    wait_for(lambda: slurm.state(job) == "FAILED", "end of the job", timeout_s=30)
    assert "ExitCode=75:0" in slurm.run("scontrol", "show", "job", job, cwd=project).stdout


def test_a_cancelled_job_has_its_ranks_save_and_stays_cancelled(slurm, project):
    job, log = submit(slurm, project, "cfg.py")
    wait_for_words(log, "rank 1 of 2 start 0")
    slurm.run("scancel", job, cwd=project)
    wait_for_words(log, "rank 1 terminated")
    wait_for(lambda: slurm.state(job) == "CANCELLED", "end of the job", timeout_s=30)


def test_a_crash_is_no_reason_to_requeue(slurm, project):
    job, log = submit(slurm, project, "cfg.py", SLURM_RESTART_COUNT="1", SECOND_CODE="1")
    wait_for(lambda: slurm.state(job) in ("FAILED", "COMPLETED"), "end of the job", timeout_s=30)
    assert slurm.state(job) == "FAILED", log.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tests", "job"), "PARTITION JOB_NAME CONFIG"),
        (("tests", "job", "cfg.py", "--resume", "there"), "leave --resume out"),
    ],
)
def test_wrong_arguments_are_told_at_once(arguments, words, slurm, project):
    done = slurm.run("sh", "launch/slurm_train.sh", *arguments, cwd=project, check=False, BATCH="1", **CPUS)
    assert done.returncode == 2 and words in done.stderr


def test_a_real_training_saves_is_requeued_and_finishes(slurm, training, tmp_path):
    work_dir = tmp_path / "run"
    script, config, *options = training(work_dir)
    assert script == "launch/train.py"
    job, log = submit(slurm, ROOT, config, *options, SBATCH_ARGS=f"--output={tmp_path}/job.log")
    wait_for(
        lambda: (work_dir / "metrics.jsonl").exists() and steps_of(work_dir),
        "step",
        output=lambda: log.read_text() if log.exists() else "",
    )
    slurm.run("scancel", "--signal=USR1", job, cwd=ROOT)
    wait_for_words(log, f"saved; job {job} goes back into the queue")
    assert steps_of(work_dir)[-1] < STEPS
    wait_for(lambda: slurm.state(job) == "COMPLETED", "end of the job", timeout_s=180, output=log.read_text)
    assert steps_of(work_dir) == list(range(1, STEPS + 1))


def test_two_tasks_of_srun_train_together(slurm, training, tmp_path):
    work_dir = tmp_path / "run"
    slurm.run("sh", "launch/slurm_train.sh", "tests", "job", *training(work_dir)[1:], cwd=ROOT, **CPUS)
    assert steps_of(work_dir) == list(range(1, STEPS + 1))
    assert len(list((work_dir / "checkpoints" / f"iter_{STEPS}").glob("*optim_states.pt"))) == 2
