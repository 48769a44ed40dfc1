import pytest
import torch
from mmcv import Config
from mmcv.runner import build_runner
from mmcv.runner.hooks import HOOKS

from internseg_ds.config.lr_schedule import LrSchedule, policies, policy_name, read_schedule


class Steps(torch.nn.Module):
    """What mmcv's runner asks of a model."""

    def train_step(self) -> None: ...


def mmcv_rates(
    bases: list[float], steps: int, policy: str, settings: dict, epoch: int | None = None
) -> list[list[float]]:
    """Learning rates per step and group that mmcv's own hook sets in its own runner. epoch: its steps, of a
    runner that counts epochs."""
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in bases]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(params, bases)], lr=1.0)
    hook = HOOKS.get(policy_name(policy) + "LrUpdaterHook")(**{"by_epoch": epoch is not None, **settings})
    length = {"type": "IterBasedRunner", "max_iters": steps}
    if epoch is not None:
        length = {"type": "EpochBasedRunner", "max_epochs": steps // epoch}
    runner = build_runner(
        length,
        {"model": Steps(), "optimizer": optimizer, "logger": __import__("logging").getLogger()},
    )
    runner.data_loader = [None] * (epoch or steps)
    runner._max_iters = steps
    hook.before_run(runner)
    rates = []
    for step in range(steps):
        runner._iter = step
        runner._epoch = step // (epoch or steps)
        if step % (epoch or steps) == 0:
            hook.before_train_epoch(runner)
        hook.before_train_iter(runner)
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


WARM = dict(warmup="linear", warmup_iters=7, warmup_ratio=1e-6)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("poly", dict(power=1.0, min_lr=0.0, **WARM)),
        ("poly", dict(power=0.9, min_lr=1e-4, warmup="linear", warmup_iters=5)),
        ("poly", dict(power=2.0)),
        ("poly", dict(warmup="exp", warmup_iters=7)),
        ("poly", dict(warmup="constant", warmup_iters=7, warmup_ratio=0.3)),
        ("step", dict(step=[8, 15], **WARM)),
        ("step", dict(step=6, gamma=0.5, min_lr=1e-5)),
        ("fixed", dict(**WARM)),
        ("exp", dict(gamma=0.9)),
        ("inv", dict(gamma=0.1)),
        ("CosineAnnealing", dict(min_lr_ratio=0.01, **WARM)),
        ("FlatCosineAnnealing", dict(min_lr=1e-6, start_percent=0.5)),
        ("FlatCosineAnnealing", dict(min_lr=1e-6, start_percent=1.0)),
        ("LinearAnnealing", dict(min_lr=0.0)),
    ],
)
def test_rates_are_those_of_mmcvs_hook_step_by_step_in_every_group(policy, settings):
    bases, steps = [1e-2, 3e-3], 20
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in bases]
    optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(params, bases)], lr=1.0)
    scheduler = LrSchedule(steps, policy, settings).scheduler(optimizer)
    for expected in mmcv_rates(bases, steps, policy, settings):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("poly", dict(power=0.9, min_lr=1e-4, **WARM)),
        ("poly", dict(power=0.9, by_epoch=False, **WARM)),
        ("step", dict(step=[2, 4], warmup="linear", warmup_iters=2, warmup_by_epoch=True)),
        ("CosineAnnealing", dict(min_lr=0.0)),
        ("fixed", {}),
    ],
)
def test_rates_of_a_run_in_epochs_are_those_of_mmcvs_runner_that_counts_them(policy, settings):
    epochs, epoch, base = 5, 4, 1e-2
    cfg = Config(
        dict(
            runner=dict(type="EpochBasedRunner", max_epochs=epochs), lr_config=dict(policy=policy, **settings)
        )
    )
    schedule = read_schedule(cfg, "a config").with_epochs_of(epoch)
    expected = mmcv_rates([base], epochs * epoch, policy, settings, epoch=epoch)
    assert [schedule.lr(step, base) for step in range(epochs * epoch)] == pytest.approx(
        [rate for (rate,) in expected], rel=1e-9
    )
    assert schedule.max_steps == epochs * epoch


def test_the_rate_ends_at_min_lr_and_stays_there():
    schedule = LrSchedule(10, settings=dict(power=1.0, min_lr=1e-5))
    assert schedule.lr(10, 1e-3) == schedule.lr(11, 1e-3) == pytest.approx(1e-5)


def test_policies_that_look_at_the_optimizer_are_not_among_those_that_are_known():
    assert {"Poly", "Step", "Fixed", "CosineAnnealing"} <= set(policies()) and not {
        "Cyclic",
        "OneCycle",
    } & set(policies())
