"""Fixtures of the whole suite: a generated data set, and real launches of the real scripts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "configs/intern_vit_tiny/upernet_intern_vit_tiny_112_ade20k.py"
IMAGE = "configs/intern_image_tiny/upernet_intern_image_tiny_112_ade20k.py"


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated data set in ADE20K's layout: 23 training and 7 validation images of different sizes."""
    from internseg_ds.data.generated_ade20k import write_generated_ade20k

    root = tmp_path_factory.mktemp("data") / "ade"
    write_generated_ade20k(root, training=23, validation=7)
    return root


def data_options(root: Path) -> list[str]:
    return [f"data.{split}.data_root={root}" for split in ("train", "val", "test")]


Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(script, *args, processes=2, launcher="deepspeed", env={}, check=True): runs a script of the project as a user would, from its root.

    On CPUs, whatever the machine has: the GPU part of the suite asks for its GPU with env={"CUDA_VISIBLE_DEVICES": ...}.
    """

    def run(script: str, *args: object, processes: int = 2, launcher: str = "deepspeed", env: dict[str, str] | None = None, check: bool = True,
            timeout: float = 300) -> subprocess.CompletedProcess:
        port = free_port()
        command = {
            "deepspeed": ["deepspeed", "--num_gpus", str(processes), "--master_port", str(port)],
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port)],
            "python": [sys.executable],
        }[launcher]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run([*command, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})})
        if check and done.returncode:
            raise AssertionError(f"{script} {' '.join(map(str, args))} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        if not done.returncode:
            assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # memory that would stay until the machine restarts
        return done

    return run


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def toy_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoints folder per setting of `write_toy_checkpoints.py`, all written by one job of two processes (some 20 s)."""
    out = tmp_path_factory.mktemp("toy")
    script = ROOT / "tests/checkpoints/write_toy_checkpoints.py"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja, for DeepSpeed's extensions
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, out], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return out
