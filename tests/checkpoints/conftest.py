"""ZeRO checkpoints that DeepSpeed itself wrote, small and of many settings, for the tests of their reader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toy_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoints folder per setting of `write_toy_checkpoints.py`, all written by one job of two processes (some 20 s)."""
    out = tmp_path_factory.mktemp("toy")
    script = Path(__file__).with_name("write_toy_checkpoints.py")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja, for DeepSpeed's extensions
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, out], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return out
