import pytest
import torch

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.optimizers import build_optimizer, check_optimizer
from internseg_ds.optimization.ranged_adam import RangedAdam

ADAMW = {"type": "AdamW", "lr": 1e-2, "betas": (0.9, 0.999), "weight_decay": 0.05}


def groups(seed: int) -> list[dict]:
    torch.manual_seed(seed)
    params = [torch.randn(5, requires_grad=True) for _ in range(4)]
    for param in params:
        param.grad = torch.randn(5)
    return [
        {"params": [param], "lr": 1e-2 * (index + 1), "weight_decay": 0.1 * index}
        for index, param in enumerate(params)
    ]


OTHERS = [{**ADAMW, "amsgrad": True}, {"type": "SGD", "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.05}]


@pytest.mark.parametrize("section", OTHERS, ids=str)
def test_groups_updated_one_by_one_as_zero3_does_are_those_updated_at_once_in_plain_torch(section):
    plain, ours = groups(0), groups(0)
    settings = {key: value for key, value in section.items() if key != "type"}
    reference = getattr(torch.optim, section["type"])(plain, **settings)
    ds = resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=section)
    optimizer = build_optimizer(ours, section, ds)
    assert isinstance(optimizer, getattr(torch.optim, section["type"]))
    for _ in range(3):
        reference.step()
        held = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []
        for group, params in zip(optimizer.param_groups, held):
            group["params"] = params
            optimizer.step()
            assert len(optimizer.param_groups) == 4
            group["params"] = []
        for group, params in zip(optimizer.param_groups, held):
            group["params"] = params
    for wanted, got in zip(plain, ours):
        torch.testing.assert_close(got["params"][0], wanted["params"][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("section", OTHERS, ids=str)
def test_an_optimizers_hooks_run_once_a_step(section):
    ds = resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=section)
    optimizer, steps = build_optimizer(groups(0), section, ds), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # which wraps step, too
    optimizer.step()
    assert steps == [1]


def test_adamw_is_fused_unless_the_config_asks_for_foreach():
    ds = resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=ADAMW)
    assert build_optimizer(groups(0), ADAMW, ds).defaults["fused"] is True
    assert not build_optimizer(groups(0), {**ADAMW, "foreach": True}, ds).defaults["fused"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(betas=0.9), "AdamW does not take optimizer.betas=0.9: TypeError"),
        (
            dict(betas=[0.9, 0.99, 0.999]),
            r"not take optimizer.betas=\[0.9, 0.99, 0.999\]: ValueError: too many",
        ),
        (
            dict(betas=[2.0, 0.9], eps=-1),
            r"not take optimizer.betas=\[2.0, 0.9\], optimizer.eps=-1: ValueError",
        ),
        (dict(type="SGD", momentum=float("nan")), "SGD does not take optimizer.momentum=nan: .* not finite"),
        (dict(foreach=True, fused=True), "settings together: lr, foreach, fused: RuntimeError"),
        (dict(amsgrad="no"), "optimizer.amsgrad='no' must be True or False"),
        (dict(type="Muon", betas=[0.9]), r"Muon does not take optimizer.betas=\[0.9\]"),
        (dict(type="Muon", limit=3), "unknown key 'limit' in optimizer Muon"),
    ],
    ids=str,
)
def test_the_setting_at_fault_is_named(section, words):
    section = dict(type="AdamW", lr=1e-2) | section
    ds = resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=section)
    with pytest.raises(ConfigError, match=words):
        check_optimizer(section, ds)


@pytest.mark.parametrize("states", ["fp32", "8bit"])
def test_torchs_adamw_by_its_path_is_adamw(states):
    section = ADAMW | {"type": "torch.optim.AdamW"}
    ds = resolve_ds_config(
        {"zero_allow_untested_optimizer": False, "optimizer": {"type": "AdamW"}},
        experiment="",
        micro_batch=1,
        world_size=1,
        optimizer=section,
        optimizer_states=states,
    )
    assert ds.raw["zero_allow_untested_optimizer"]
    optimizer = build_optimizer(groups(0), section, ds)
    assert isinstance(optimizer, RangedAdam) and optimizer.settings.defaults["fused"]
