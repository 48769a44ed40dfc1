"""Python's garbage collector in a training: at the same moments on every rank, and as before afterwards."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from internseg_ds.garbage_collection import SteppedCollector
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment


class Node:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def collections_seen(found: list[int]) -> Iterator[None]:
    """Appends the generation of each collection inside."""

    def note(phase: str, info: dict) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield
    finally:
        gc.callbacks.remove(note)


def garbage(count: int = 5000) -> weakref.ref:
    """Far more than Python's own threshold; returns a reference to the last one."""
    nodes = [Node() for _ in range(count)]
    return weakref.ref(nodes[-1])


def test_nothing_is_collected_between_the_ends_of_steps_and_all_of_it_there():
    found: list[int] = []
    with SteppedCollector() as collector, collections_seen(found):
        for step in range(1, 4):
            last = garbage()
            assert found == [1] * (step - 1) and last() is not None
            assert gc.get_count()[0] > 4000
            with collector.after_step(pauses=False):
                assert last() is None and gc.get_count()[0] < 1000
        kept = Node()  # outlives the collection of its step, and is garbage behind that
        with collector.after_step(pauses=False):
            alive = weakref.ref(kept)
        del kept
        with collector.after_step(pauses=False):
            assert alive() is not None
        found.clear()
        with collector.after_step(pauses=True):
            assert not found
            garbage()
            assert 0 in found  # by itself
        assert alive() is None and found[-1] == 2
        found.clear()
        garbage()
        assert not found


@pytest.mark.parametrize("enabled", [True, False])
def test_afterwards_the_collector_is_as_it_was_whatever_ended_the_training(enabled):
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), SteppedCollector() as collector:
            assert gc.get_freeze_count() > 1000 and not gc.isenabled()
            with collector.after_step(pauses=True):
                raise KeyError
        assert gc.isenabled() == enabled and gc.get_freeze_count() == 0
    finally:
        (gc.enable if was_enabled else gc.disable)()


def trains_with_collections_at_the_ends_of_steps(root: Path, work_dir: Path) -> None:
    from internseg_ds import SegmentorEngine

    gc.set_threshold(50)
    cfg = small_experiment(root, "runner.max_iters=4", "log_config.interval=2")
    found: list[tuple[int, int]] = []
    with SegmentorEngine(
        cfg, ROOT / "ds_configs/zero3_bf16.json", work_dir=work_dir, validate=False, saves=False
    ) as engine:

        def note(phase: str, info: dict) -> None:
            if phase == "start" and not gc.isenabled():
                found.append((engine.state.step, info["generation"]))

        gc.callbacks.append(note)
        engine.train()
        gc.callbacks.remove(note)
    assert gc.isenabled()
    # on entering, after what may be evaluated before the first step, and at the end of each step
    expected = [(0, 2), (0, 2), *((step, 1) for step in range(1, 5))]
    of_all: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, found)
    assert of_all == [expected] * 2


def test_a_training_collects_at_the_end_of_each_step_on_every_rank(ade20k, tmp_path):
    spawn(trains_with_collections_at_the_ends_of_steps, 2, ade20k, tmp_path / "run")
