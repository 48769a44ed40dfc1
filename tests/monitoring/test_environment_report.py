"""`internseg-train --env`: what it says of this machine, and that nothing broken keeps it from saying the rest."""

import os
import platform
import subprocess
import sys

import torch

from tests.conftest import ROOT


def report(broken: dict[str, str], tmp_path) -> list[str]:
    """Its lines where the modules of `broken` are what it says they are. Their folder goes first on the path."""
    for name, code in broken.items():
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "--env"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_report_names_what_is_there_and_what_cannot_be_imported(tmp_path):
    broken = {
        "timm": "import a_part_that_is_missing",
        "deepspeed": "raise OSError('libcudart.so: no such file')",
    }
    lines = report(broken, tmp_path)
    text = "\n".join(lines)
    assert lines[0].startswith("internseg_ds ") and lines[1].startswith(
        f"python {platform.python_version()} "
    )
    assert f"torch {torch.__version__.split('+')[0]}" in text and "mmcv-full 1.7.2" in text
    assert "import timm: FAILS: ModuleNotFoundError: No module named 'a_part_that_is_missing'" in lines
    assert "import deepspeed: FAILS: OSError: libcudart.so: no such file" in lines
    assert not [line for line in lines if line.startswith(("import torch", "import mmcv"))]
    assert any(line.startswith("DeepSpeed's cpu_adam: ") for line in lines)
    assert any(line.startswith("variables: ") and "DS_ACCELERATOR=cpu" in line for line in lines)


def test_without_torch_the_rest_is_told(tmp_path):
    lines = report({"torch": "raise ImportError('undefined symbol: ncclCommWindowRegister')"}, tmp_path)
    assert "import torch: FAILS: ImportError: undefined symbol: ncclCommWindowRegister" in lines
    assert any(line.startswith("gpus: cannot be told: ImportError") for line in lines)
    assert lines[-1].startswith("variables: ")
