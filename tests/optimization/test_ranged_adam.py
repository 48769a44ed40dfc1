"""One parameter group for all settings against one for each: the same weights and moments to the last bit."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.distributed.zero_internals import fp32_partitions, fragment_of
from internseg_ds.optimization import optimizers
from internseg_ds.optimization.ranged_adam import RangedAdam, bundles
from internseg_ds.zero_partition import full_shape
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

STEPS = 4
ADAMW = {"type": "AdamW", "lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.05}


@pytest.mark.parametrize(
    "section",
    [ADAMW, {**ADAMW, "type": "Adam"}, {**ADAMW, "foreach": True}, {**ADAMW, "maximize": True}],
    ids=str,
)
def test_ranges_of_a_flat_tensor_are_updated_as_tensors_of_their_own_in_plain_torch(section):
    sizes, cuts = [5, 1, 1030, 64], [0, 5, 6, 1036, 1100]
    torch.manual_seed(0)
    plain = [
        {
            "params": [torch.randn(size, requires_grad=True)],
            "lr": 1e-2 * (index + 1),
            "weight_decay": 0.1 * index,
        }
        for index, size in enumerate(sizes)
    ]
    flat = torch.cat([group["params"][0].detach() for group in plain])
    settings = {key: value for key, value in section.items() if key != "type"}
    ds = resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=section)
    ours = optimizers.build_optimizer(
        [{**group, "params": [torch.nn.Parameter(torch.zeros(1))]} for group in plain], section, ds
    )
    reference = getattr(torch.optim, section["type"])(
        plain, **({"fused": True} if not section.get("foreach") else {}), **settings
    )
    assert isinstance(ours, RangedAdam) and len(ours.param_groups) == 1
    ours.param_groups[0]["params"] = [flat]
    ours.divide({flat: [(start, stop, number) for number, (start, stop) in enumerate(pairwise(cuts))]})
    for _ in range(3):
        flat.grad = torch.randn(flat.shape)
        for group, grad in zip(plain, flat.grad.split(sizes), strict=True):
            group["params"][0].grad = grad.clone()
        for group in reference.param_groups:
            group["lr"] *= 0.9
        for group in ours.settings.param_groups:
            group["lr"] *= 0.9
        reference.step(), ours.step()
        assert torch.equal(flat, torch.cat([group["params"][0].detach() for group in plain]))
    for what in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(
            ours.state[flat][what], torch.cat([reference.state[group["params"][0]][what] for group in plain])
        )
    assert ours.state[flat]["step"] == 3 and ours.param_groups[0]["lr"] == pytest.approx(4e-2 * 0.9**3)
    assert all(not group["params"] for group in ours.settings.param_groups)


def test_settings_are_bundled_in_order_up_to_a_limit():
    assert bundles([5, 5, 5, 20, 1, 1], 10) == [[0, 1], [2], [3], [4, 5]]
    assert bundles([5, 5], math.inf) == [[0, 1]] and bundles([], 10) == []


def whole_state(engine) -> dict[str, torch.Tensor]:
    """Of every trained parameter, by name: master, exp_avg and exp_avg_sq below each other. (DeepSpeed
    0.19.8's own helper knows the moments of the first group alone under ZeRO-1 and 2.)"""
    found, inner = {}, engine.optimizer.optimizer
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found[name] = torch.zeros(3, full_shape(param).numel())
            if (fragment := fragment_of(engine, param)) is not None:
                flat = fp32_partitions(engine)[fragment.partition]
                for row, values in zip(
                    found[name],
                    (flat.data, inner.state[flat]["exp_avg"], inner.state[flat]["exp_avg_sq"]),
                    strict=True,
                ):
                    row[fragment.start : fragment.stop] = values[fragment.in_partition]
            dist.all_reduce(found[name])
    return found


def trained(root, work_dir, raw, *, ranged: bool, limit: float = math.inf, **steps):
    """Of every trained parameter, by name: (master, exp_avg, exp_avg_sq), after a training of STEPS steps;
    and the learning rates at its end."""
    from internseg_ds import SegmentorEngine

    was = optimizers.is_ranged, optimizers.group_limit
    optimizers.is_ranged, optimizers.group_limit = was[0] if ranged else lambda *_: False, lambda _: limit
    experiment = small_experiment(
        root,
        f"runner.max_iters={STEPS}",
        "model.backbone.freeze_vit=False",
        "engine.ema=0.9",
        *(f"{key}={value}" for key, value in steps.items()),
    )
    try:
        with SegmentorEngine(experiment, raw, work_dir=work_dir, validate=False) as engine:
            if "checkpoint_config.interval" not in steps:
                engine.options = replace(engine.options, saves=False)
            engine.train()
            inner = engine.deepspeed.optimizer.optimizer
            assert isinstance(inner, RangedAdam) == ranged
            groups = (
                5
                if ranged and limit < math.inf
                else 1
                if ranged
                else len(engine.deepspeed.lr_scheduler.base_lrs)
            )
            assert len(inner.param_groups) >= groups and (len(inner.param_groups) == 1) == (groups == 1)
            return whole_state(engine.deepspeed), engine.deepspeed.lr_scheduler.base_lrs
    finally:
        optimizers.is_ranged, optimizers.group_limit = was


def both_ways(root, work_dir, raws) -> None:
    for number, raw in enumerate(raws):
        # a CPU's fused kernel rounds the last few elements of a tensor otherwise than the rest, and ZeRO-1
        # and 2 cut their tensors elsewhere
        kernel = {"optimizer.foreach": True} if raw["zero_optimization"]["stage"] < 3 else {}
        limit = 20_000 if raw["zero_optimization"]["stage"] == 2 else math.inf
        (one, rates), (many, expected) = (
            trained(root, work_dir / f"{number}{ranged}", raw, ranged=ranged, limit=limit, **kernel)
            for ranged in (True, False)
        )
        assert rates == expected and len(set(rates)) > 3
        assert one.keys() == many.keys()
        for name, wanted in many.items():
            assert wanted[2].any() and torch.equal(one[name], wanted), (
                raw,
                name,
                (one[name] - wanted).abs().amax(1),
            )


BF16 = {"bf16": {"enabled": True}}
STAGES = [
    {**BF16, "zero_optimization": {"stage": stage, "overlap_comm": True, **more}}
    for stage, more in (
        (1, {}),
        (2, {}),
        (3, {}),
        (3, {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}),
    )
]
FP32 = [{"zero_optimization": {"stage": 3}}, {"zero_optimization": {"stage": 2}}]


@pytest.mark.parametrize(
    "raws",
    [
        STAGES[1::2],
        pytest.param(STAGES[::2], marks=pytest.mark.slow),
        pytest.param(FP32, marks=pytest.mark.slow),
    ],
    ids=["bf16", "bf16, plain", "fp32"],
)
def test_weights_and_moments_are_those_of_a_group_for_each_setting_under_every_stage(ade20k, tmp_path, raws):
    spawn(both_ways, 2, ade20k, tmp_path, raws)


def goes_on_from_a_checkpoint_with_a_group_for_each_setting(root, work_dir) -> None:
    import shutil

    from internseg_ds import SegmentorEngine

    raw = STAGES[2]
    saving = {"checkpoint_config.interval": 2, "engine.ema": 0.9}
    whole, _ = trained(root, work_dir / "whole", raw, ranged=True, **saving)
    trained(root, work_dir / "many", raw, ranged=False, **saving)
    if dist.get_rank() == 0:
        shutil.rmtree(work_dir / "many/checkpoints" / f"iter_{STEPS}")
        (work_dir / "many/checkpoints/latest").write_text("iter_2")
    dist.barrier()
    experiment = small_experiment(root, f"runner.max_iters={STEPS}", "engine.ema=0.9")
    with SegmentorEngine(
        experiment, raw, work_dir=work_dir / "many", resume="auto", validate=False
    ) as engine:
        assert engine.state.step == 2 and isinstance(engine.deepspeed.optimizer.optimizer, RangedAdam)
        engine.options = replace(engine.options, saves=False)
        engine.train()
        resumed = whole_state(engine.deepspeed)
        assert all(torch.equal(resumed[name], wanted) for name, wanted in whole.items())


@pytest.mark.slow
def test_a_checkpoint_with_a_group_for_each_setting_is_gone_on_from(ade20k, tmp_path):
    spawn(goes_on_from_a_checkpoint_with_a_group_for_each_setting, 2, ade20k, tmp_path)
