"""Fixtures of the whole suite: a generated data set, and real launches of the real scripts."""

import os

# of all tests and what they start, before any import asks; some ask for a GPU again
os.environ["INTERNSEG_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from internseg_ds.torch_internals import build_was_interrupted, extension_folder
from tests.forks import PATH, ROOT, run_script

GPU = {"INTERNSEG_DEVICE": "cuda", "DS_ACCELERATOR": "cuda"}
TINY = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
IMAGE = "configs/intern_image_tiny/upernet_intern_image_tiny_112_ade20k.py"
TIMM = "configs/timm_tiny/upernet_dinov3_tiny_112_ade20k.py"
EOMT = "configs/timm_tiny/eomt_dinov3_tiny_112_ade20k.py"
TRANSFORMERS = "configs/transformers_tiny/upernet_dinov3_tiny_112_ade20k.py"
MASK2FORMER = "configs/intern_vit_tiny/mask2former_intern_vit_tiny_112_ade20k.py"


OnceForAllWorkers = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def once_for_all_workers(tmp_path_factory: pytest.TempPathFactory) -> OnceForAllWorkers:
    """once_for_all_workers(name, make): what `make` returns, made in one of pytest-xdist's processes and read by
    the others; files that it names stay as they are made."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def made(name: str, make: Callable[[], Any]) -> Any:
        file = root / f"{name}.pickle"
        with FileLock(f"{file}.lock"):
            if not file.exists():
                value = make()  # what it raises, each worker sees
                file.write_bytes(pickle.dumps(value))
            return pickle.loads(file.read_bytes())

    return made


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory: pytest.TempPathFactory, once_for_all_workers: OnceForAllWorkers) -> Path:
    """A small generated data set in ADE20K's layout: 23 training and 7 validation images of different
    sizes."""
    from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k

    def make() -> Path:
        root = tmp_path_factory.mktemp("data") / "ade"
        write_generated_ade20k(root, training=23, validation=7)
        return root

    return once_for_all_workers("ade20k", make)


def data_options(root: Path) -> list[str]:
    return [f"data.{split}.data_root={root}" for split in ("train", "val", "test")]


@pytest.fixture(scope="session", autouse=True)
def extension() -> None:
    """DeepSpeed's extension, compiled before any test that kills processes kills one that compiles: what
    torch guards a build with would then be left, and tests that start DeepSpeed by themselves would wait for
    it for ever."""
    folder = extension_folder("deepspeed_shm_comm")
    if build_was_interrupted(folder) or not (folder / "deepspeed_shm_comm.so").exists():
        build = (
            "from internseg_ds.distributed.extensions import build_extension; "
            "build_extension('ShareMemCommBuilder')"
        )
        subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Takes back what a test, or an engine in it, left in os.environ: RANK, MASTER_PORT and the like would
    make other tests ranks of that run."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser. Of one module: while it runs, no event loop of another kind can."""
    from tests.browser import chromium

    with chromium() as running:
        yield running


Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(script, *args, processes=2, launcher="forks", env={}, check=True): runs a script of the project
    as a user would, from its root.

    launcher: "deepspeed", "torchrun" or "python", where starting is part of what is tested; "forks" saves the
    some 10 s of two cores that they take to start. On CPUs, whatever the machine has: the GPU part of the
    suite asks for its GPU with env=GPU, which "forks" cannot give.
    """

    def run(
        script: str,
        *args: object,
        processes: int = 2,
        launcher: str = "forks",
        env: dict[str, str] | None = None,
        check: bool = True,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess:
        port = free_port()
        if launcher == "forks":
            done = run_script(script, [*map(str, args)], processes, port, env=env, timeout=timeout)
        else:
            command = {
                "deepspeed": ["deepspeed", "--num_gpus", str(processes), "--master_port", str(port)],
                "torchrun": [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc_per_node",
                    str(processes),
                    "--master_port",
                    str(port),
                ],
                "python": [sys.executable],
            }[launcher]
            done = subprocess.run(
                [*command, script, *map(str, args)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=timeout,
                env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1", **(env or {})},
            )
        if check and done.returncode:
            raise AssertionError(
                f"{script} {' '.join(map(str, args))} ended with "
                f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            )
        if not done.returncode:
            # memory that would stay until the machine restarts
            assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))
        return done

    return run


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def toy_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, once_for_all_workers: OnceForAllWorkers
) -> Path:
    """A folder with one checkpoints folder per setting of `write_toy_checkpoints.py`, all written by one job
    of two processes (some 20 s)."""

    def make() -> Path:
        out = tmp_path_factory.mktemp("toy")
        script = str(ROOT / "tests/checkpoints/write_toy_checkpoints.py")
        done = run_script(script, [str(out)], 2, free_port())
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return out

    return once_for_all_workers("toy_checkpoints", make)
