import logging
import math

import pytest
import torch
import torch.distributed as dist

from internseg_ds.monitoring.step_metrics import Spikes, StepMetrics
from tests.distributed.ranks import spawn
from tests.waits import HostReads


def terms(loss: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "acc": torch.tensor(2 * loss)}


def means_over_micro_batches_steps_and_ranks() -> None:
    rank, metrics = dist.get_rank(), StepMetrics()
    for step in range(3):
        for micro_batch in range(2):
            metrics.add(terms(10 * step + 2 * micro_batch + rank))
        metrics.end_step(grad_norm=float(step))
    means, losses, of_ranks = metrics.means_over_ranks((0.5 + rank, 7.0))
    assert losses == pytest.approx([1.5, 11.5, 21.5]) and of_ranks == [[0.5, 7.0], [1.5, 7.0]]
    assert means == pytest.approx({"loss": 11.5, "acc": 23.0, "grad_norm": 1.0, "grad_norm_max": 2.0})


def what_lies_on_the_device_comes_over_in_one_transfer() -> None:
    metrics = StepMetrics()
    for step in range(4):
        metrics.add(terms(float(step)))
        metrics.end_step(torch.tensor(2.0 * step))
    metrics.add(terms(4.0))
    metrics.end_step(8.0)  # as DeepSpeed gives it before the first step, and with offloading
    with HostReads() as reads:
        means, losses, of_ranks = metrics.means_over_ranks((0.25, 0.5))
    assert of_ranks == [[0.25, 0.5]] * dist.get_world_size()
    assert reads.found == {"step_metrics.py:means_over_ranks": 2}  # .cpu().tolist()
    assert losses == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert means == {"loss": 2.0, "acc": 4.0, "grad_norm": 4.0, "grad_norm_max": 8.0}


def a_loss_that_is_not_finite_is_left_out_of_the_means() -> None:
    metrics = StepMetrics()
    metrics.add(terms(math.nan if dist.get_rank() else 4.0))
    metrics.end_step(None)
    metrics.add(terms(1.0))
    metrics.end_step(3.0)
    means, losses, of_ranks = metrics.means_over_ranks()
    assert of_ranks == []
    assert means == pytest.approx({"loss": 2.0, "acc": 4.0, "grad_norm": 3.0, "grad_norm_max": 3.0})
    assert math.isnan(losses[0]) and losses[1] == 1.0


@pytest.mark.parametrize(
    "what",
    [
        means_over_micro_batches_steps_and_ranks,
        what_lies_on_the_device_comes_over_in_one_transfer,
        a_loss_that_is_not_finite_is_left_out_of_the_means,
    ],
)
def test_an_interval_of_two_ranks(what):
    spawn(what, 2)


def test_a_loss_that_stands_out_is_a_spike_and_noise_is_none(caplog, monkeypatch):
    # a run before may have switched it off
    monkeypatch.setattr(logging.getLogger("internseg_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "internseg_ds")
    spikes, noise = Spikes(), torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.1
    falling = [float(5 * 0.99**step + 1 + noise[step]) for step in range(300)]
    assert spikes.among(falling, 300) == {}
    assert spikes.among([1.2, math.nan, 9.0, 1.2], 304) == {"loss_spikes": 1}
    assert "step 303: the loss of 9 " in caplog.text


def test_no_loss_is_a_spike_while_nothing_is_known():
    assert Spikes().among([1.0, 100.0, 1.0], 3) == {}
