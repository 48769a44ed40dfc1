import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from internseg_ds.engine.stragglers import LayerClock, slowest

HOSTS = ["a", "a", "b", "b"]


def test_the_rank_whose_data_come_late_is_named_with_what_it_costs():
    found = slowest([0.01, 0.02, 0.51, 0.01], [0.4, 0.4, 0.4, 0.42], step_s=1.0, hosts=HOSTS)
    assert (found.rank, found.cause) == (2, "data") and found.share == pytest.approx(0.5)
    assert "rank 2 (host b) waits 0.51 s a step for data where the median rank waits 0.01 s" in found.text


def test_the_rank_that_computes_slowly_is_named_with_what_it_costs_at_most():
    found = slowest([0.01, 0.02, 0.01, 0.01], [0.4, 0.5, 0.4, 0.4], step_s=1.0, hosts=HOSTS)
    assert (found.rank, found.cause) == (1, "layers") and found.share == pytest.approx(0.2)
    assert "rank 1 (host a) computes 1.25 times as long" in found.text


def test_of_two_ranks_the_faster_one_is_what_the_slower_is_held_against():
    assert slowest([0.0, 0.3], [1.0, 1.0], step_s=1.0, hosts=["a", "a"]).share == pytest.approx(0.3)


class Sleeping(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def test_the_clock_adds_up_the_layers_and_their_recomputation_and_nothing_between():
    layers = nn.ModuleList([Sleeping(2, 2), nn.Sequential(Sleeping(2, 2), Sleeping(2, 2))])
    clock, x = LayerClock(layers, torch.device("cpu")), torch.ones(1, 2, requires_grad=True)
    with clock:
        y = layers[0](x)
        time.sleep(0.2)
        checkpoint(layers[1], y, use_reentrant=False).sum().backward()
    seconds = clock.seconds
    assert 0.08 <= seconds < 0.2  # three forwards, and the recomputation up to the last one's input, which is all that the backward needs
    layers[0](x)
    assert clock.seconds == seconds  # the hooks are gone
    with clock:
        pass
    assert clock.seconds == 0
