"""Ranks that start in milliseconds: forked from one process which, once a session, has imported all that a
training imports (some 5 s of a core for each rank).

In: a function of a test module, or a script of the project with its arguments. Out: processes of their own in
the environment that torchrun gives its ranks, or what a script printed and its exit code. Keeps away from
launchers: those are real, in tests whose subject they are, as are processes that end by themselves: a fork
leaves out what Python does at its exit, and has imported what a script may have forgotten to.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""With the launchers, and ninja for DeepSpeed's extensions."""
KILLED_AFTER_S = 10
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(
    [
        "internseg_ds.training.segmentor_engine",
        "internseg_ds.evaluation.test",
        "internseg_ds.evaluation.predict",
        "internseg_ds.distributed.extensions",
        "tests.forks",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "torch.utils.tensorboard",
        "matplotlib.backends.backend_agg",
        "peft",
    ]
)


def ready() -> None:
    """Starts the process that all others are forked from, unless it is there. On the CPU, whatever the
    machine has: a fork cannot take up CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("INTERNSEG_DEVICE", "DS_ACCELERATOR"):
            patch.setenv(name, "cpu")
        multiprocessing.forkserver.ensure_running()


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on one host."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "PATH": PATH,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start_ranks(
    function: Callable[..., None],
    world_size: int,
    port: int,
    *args: object,
    env: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """Processes that call function(*args) in this process's environment and their own."""
    ready()
    ranks = [
        forks.Process(
            target=_rank,
            args=({**os.environ, **environment_of(rank, world_size, port), **(env or {})}, function, args),
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def _rank(env: dict[str, str], function: Callable[..., None], args: tuple) -> None:
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, (
        "something that is imported before the fork has started a thread, which no fork has"
    )
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in any training
    function(*args)


def script(path: str, args: Sequence[str], stdout: Path, stderr: Path) -> None:
    """On a rank: what `python PATH ARGS` does, from the project's root, with its output at the end of two
    files, or of one."""
    for number, file in ((1, stdout), (2, stderr)):
        with file.open("a") as opened:
            os.dup2(opened.fileno(), number)
    os.chdir(ROOT)
    sys.argv = [path, *args]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        for number, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                stream.flush()
            except BrokenPipeError:  # of which multiprocessing would make an exit code of its own
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), number)


def run_script(
    path: str,
    args: Sequence[str],
    world_size: int,
    port: int,
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """Waits for the ranks of a script. As launchers do, asks the others to end when one has failed, and has
    the exit code of that one."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch(), err.touch()
        ranks = start_ranks(script, world_size, port, path, args, out, err, env=env)
        try:
            deadline = time.monotonic() + timeout
            while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
                assert time.monotonic() < deadline, (
                    f"{path} has not ended after {timeout} "
                    f"s\n{out.read_text()[-3000:]}\n{err.read_text()[-3000:]}"
                )
                time.sleep(0.02)
            code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.join(KILLED_AFTER_S)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        return subprocess.CompletedProcess([path, *args], code, out.read_text(), err.read_text())
