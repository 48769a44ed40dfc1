"""A built wheel: what is in it, and its commands in an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

SOURCES = ("internseg_ds", "configs", "ds_configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NAME = TINY.removeprefix("configs/").removesuffix(".py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:  # a copy, for a build leaves folders beside its sources
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True)
    return next(out.glob("*.whl"))


def test_a_wheel_holds_the_package_and_all_configs_and_ds_configs(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "internseg_ds").rglob("*.*")}
    configs = {
        f"internseg_ds/{file.relative_to(ROOT)}"
        for folder in ("configs", "ds_configs")
        for file in (ROOT / folder).rglob("*.*")
    }
    assert held == {name for name in package | configs if "__pycache__" not in name}


@pytest.mark.slow
def test_commands_of_an_installed_wheel_need_no_checkout(wheel, ade20k, tmp_path):
    installed, folder = tmp_path / "installed", tmp_path / "empty"
    folder.mkdir()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        installed,
        wheel,
    ]
    subprocess.run(pip, check=True)

    def run(command: str, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [installed / "bin" / command, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    data = [f"data.{split}.data_root={ade20k}" for split in ("train", "val", "test")]
    tried = run(
        "internseg-train", NAME, "--deepspeed_config", "zero3_bf16", "--dry-run", "--cfg-options", *data
    )
    assert tried.returncode == 0 and "ran in" in tried.stdout, tried.stderr
    planned = run("internseg-plan", NAME, "--gpus", "8")
    assert planned.returncode == 0 and "zero1_bf16 " in planned.stdout, planned.stderr
    missed = run("internseg-plan", NAME.replace("_112", "_122"))
    assert missed.returncode == 2 and f"did you mean {NAME}.py?" in missed.stderr
    assert f"in {installed}" in run("internseg-train", "--env").stdout.splitlines()[0]
    assert not list(folder.iterdir())
