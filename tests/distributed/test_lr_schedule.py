import pytest
import torch
from mmcv.runner import build_runner
from mmcv.runner.hooks.lr_updater import PolyLrUpdaterHook

from internseg_ds.distributed.lr_schedule import PolySchedule


class Steps(torch.nn.Module):
    """What mmcv's runner asks of a model."""

    def train_step(self) -> None: ...


def mmcv_rates(bases: list[float], steps: int, power: float, min_lr: float, warmup: int, ratio: float) -> list[list[float]]:
    """Learning rates per step and group that mmcv's own hook sets in its own runner."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in bases]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(params, bases)], lr=1.0)
    hook = PolyLrUpdaterHook(power=power, min_lr=min_lr, by_epoch=False, warmup="linear" if warmup else None, warmup_iters=warmup, warmup_ratio=ratio)
    runner = build_runner({"type": "IterBasedRunner", "max_iters": steps},
                          {"model": Steps(), "optimizer": optimizer, "logger": __import__("logging").getLogger()})
    hook.before_run(runner)
    rates = []
    for step in range(steps):
        runner._iter = step
        if step == 0:
            hook.before_train_epoch(runner)
        hook.before_train_iter(runner)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.parametrize(("power", "min_lr", "warmup", "ratio"), [(1.0, 0.0, 7, 1e-6), (0.9, 1e-4, 5, 0.1), (2.0, 0.0, 0, 0.1)])
def test_rates_are_those_of_mmcvs_poly_hook_step_by_step_in_every_group(power, min_lr, warmup, ratio):
    bases, steps = [1e-2, 3e-3], 20
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in bases]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(params, bases)], lr=1.0)
    scheduler = PolySchedule(steps, power, min_lr, warmup, ratio).scheduler(optimizer)
    for expected in mmcv_rates(bases, steps, power, min_lr, warmup, ratio):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_the_rate_ends_at_min_lr_and_stays_there():
    schedule = PolySchedule(max_steps=10, power=1.0, min_lr=1e-5)
    assert schedule.lr(10, 1e-3) == schedule.lr(11, 1e-3) == pytest.approx(1e-5)
