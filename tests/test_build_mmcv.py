"""Compiling mmcv-full: what is missing is one message, and joining its files loses none."""

import os
import re
import subprocess
import sys

from internseg_ds.cli.build_mmcv import MMCV, SOURCES, join_sources, kept_wheel, missing
from tests.conftest import ROOT


def test_it_is_the_version_that_is_tested():
    assert f"mmcv-full=={MMCV}\n" in (ROOT / "constraints.txt").read_text()
    assert missing() == []


def test_all_that_is_missing_is_said_in_one_message(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-m", "internseg_ds.cli.build_mmcv"],  # -S: without what is installed
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    first, *lacks = done.stderr.splitlines()
    assert first == "error: mmcv-full cannot be compiled; what is missing:"
    for words in (
        "torch, against which",
        r"C\+\+ compiler .*no-such-compiler",
        r"ninja, \"setuptools<82\"",
        "OpenCV",
        "pip in this",
    ):
        assert len([line for line in lacks if re.search(words, line)]) == 1, (words, lacks)


def test_each_source_is_compiled_once(tmp_path):
    folder = tmp_path / SOURCES
    (folder / "cpu").mkdir(parents=True)
    ours = [
        "a",
        "nms_rotated",
        "pybind",
        "cpu/a",
        "cpu/b",
        "cpu/nms_rotated",
        "cpu/psamask",
        "cpu/roi_align_rotated",
    ]
    for name in ours:
        (folder / f"{name}.cpp").write_text(f"{name}\n")
    join_sources(tmp_path)
    compiled = {
        str(file.relative_to(folder)): re.sub(
            r'#include "(.*)"\n',
            lambda found, file=file: (file.parent / found[1]).read_text(),
            file.read_text(),
        ).split()
        for file in folder.rglob("*.cpp")
    }
    assert compiled == {
        "joined.cpp": ["a", "nms_rotated"],
        "pybind.cpp": ["pybind"],
        "cpu/joined.cpp": ["cpu/a", "cpu/b"],
        "cpu/joined_apart.cpp": ["cpu/nms_rotated", "cpu/roi_align_rotated", "cpu/psamask"],
    }


def test_a_wheel_for_another_python_or_machine_is_left(tmp_path):
    tag = "cp{}{}".format(*sys.version_info[:2])
    for name in ("cp38-cp38-linux_x86_64", f"{tag}-{tag}-linux_riscv64"):
        (tmp_path / f"mmcv_full-{MMCV}-{name}.whl").touch()
    assert kept_wheel(tmp_path) is None
    right = tmp_path / f"mmcv_full-{MMCV}-{tag}-{tag}-linux_{os.uname().machine}.whl"
    right.touch()
    assert kept_wheel(tmp_path) == right
