"""An extension that takes its time to load says why, on the console and in the log. The real extension, which
the other tests have compiled."""

import fcntl
import logging
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from internseg_ds.distributed import extensions
from internseg_ds.distributed.extensions import build_extension
from internseg_ds.torch_internals import extension_folder

NAME = "deepspeed_shm_comm"


@pytest.fixture
def heard(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    monkeypatch.setattr(extensions, "PATIENCE_S", 0.001)
    caplog.set_level(logging.INFO, "internseg_ds")
    return caplog


@pytest.mark.slow  # of seconds that a busy machine does not keep
def test_whoever_loads_it_slowly_and_whoever_waits_for_that_say_so(heard):
    lock = extension_folder(NAME).parent / f"{NAME}.flock"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=build_extension, args=("ShareMemCommBuilder",))
        waiting.start()
        until = time.monotonic() + 60
        while (
            "waiting for another process of this host, which compiles DeepSpeed's deepspeed_shm_comm"
            not in heard.text
            and time.monotonic() < until
        ):
            time.sleep(0.01)
        assert f"compiling DeepSpeed's {NAME} into" not in heard.text
    waiting.join()
    assert [record.levelname for record in heard.records] == ["INFO", "WARNING"]
    assert f"compiling DeepSpeed's {NAME} into" in heard.records[-1].message


def test_the_ninja_of_this_environment_compiles_not_another_one_on_the_path(tmp_path, monkeypatch):
    other = tmp_path / "ninja"
    other.write_text("#!/bin/sh\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with extensions._own_programs_first():
        assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
    assert shutil.which("ninja") == str(other)
