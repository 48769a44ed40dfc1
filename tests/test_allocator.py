import os
import subprocess
import sys

import pytest

from internseg_ds import allocator
from internseg_ds.allocator import THRESHOLD_MB, allocator_settings, pinned_bytes
from tests.conftest import ROOT

READ = """
import os, internseg_ds, torch
torch.ones(2).sum()
print(torch._C._accelerator_getAllocatorSettings())
"""


def settings_of_torch(env: dict[str, str]) -> str:
    """What torch's allocators go by in a new process that imports internseg_ds; torch refuses settings that
    it does not know."""
    plain = {name: value for name, value in os.environ.items() if name not in allocator.NAMES}
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env={**plain, **env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_takes_the_settings_and_the_users_come_first():
    found = settings_of_torch({})
    assert "expandable_segments:True" in found and f"pinned_max_round_threshold_mb:{THRESHOLD_MB}" in found
    assert settings_of_torch({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}) == "max_split_size_mb:128"


def test_a_torch_that_declares_no_settings_gets_those_that_all_versions_have(monkeypatch):
    monkeypatch.setattr(allocator, "_declared", lambda: "")
    assert allocator_settings({}) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_settings({"PYTORCH_ALLOC_CONF": ""}) == {}


@pytest.mark.parametrize(
    ("size", "threshold", "taken"),
    [
        (0, None, 0),
        (1, None, 1),
        (1000, None, 1024),
        (1024, None, 1024),
        (1025, None, 2048),
        (100 * 2**20, None, 128 * 2**20),
        (100 * 2**20, 64, 100 * 2**20),
        (64 * 2**20 - 1, 64, 64 * 2**20),
        (3 * 2**20, 64, 4 * 2**20),
    ],
)
def test_page_locked_buffers_are_powers_of_two_up_to_the_threshold(size, threshold, taken):
    env = {
        "PYTORCH_ALLOC_CONF": f"pinned_max_round_threshold_mb:{threshold}"
        if threshold
        else "max_split_size_mb:128"
    }
    assert pinned_bytes(size, env) == taken


def test_a_threshold_that_is_no_number_counts_as_none():
    assert (
        pinned_bytes(100 * 2**20, {"PYTORCH_ALLOC_CONF": "pinned_max_round_threshold_mb:lots"}) == 128 * 2**20
    )
