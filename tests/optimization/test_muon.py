"""Muon under ZeRO-1, 2 and 3 against the same written out for one process, whose matrices are whole."""

import math
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.block_matrices import block_matrices
from internseg_ds.optimization.matrix_exchange import Matrix, Part, owners_of
from internseg_ds.optimization.optimizers import build_optimizer, check_optimizer, scheduled
from internseg_ds.optimization.parameter_groups import groups_in, parameter_groups
from internseg_ds.optimization.ranged_adam import bundles, divide_by_settings
from internseg_ds.optimization.restore import restore
from tests.distributed.ranks import spawn

MUON = {
    "type": "Muon",
    "lr": 2e-2,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "adam_lr": 1e-3,
    "betas": (0.8, 0.95),
    "paramwise_cfg": {"custom_keys": {"blocks.0": {"lr_mult": 0.5}, "fc2": {"decay_mult": 0.0}}},
}
CLIP, ACCUMULATION, IMAGES = 0.05, 2, 12
SCHEDULE = LrSchedule(100, "poly", settings={"power": 1.0})
"""IMAGES of a step are divided among ranks and micro-batches."""


class Block(nn.Module):
    """With sizes that no number of ranks in these tests divides, one matrix of a rank, a tall and a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.square = nn.Linear(5, 13), nn.Linear(13, 5), nn.Linear(5, 5)
        self.table = nn.Embedding(3, 5)
        self.position_bias = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table.weight.sum(0) + self.position_bias.sum(0)
        return x + self.square(self.fc2(torch.tanh(self.fc1(x))))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(3))


class Segmentor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.embed(x)
        for block in self.backbone.blocks:
            x = block(x)
        return self.head(x).square().mean()


def fresh() -> Segmentor:
    torch.manual_seed(0)
    return Segmentor()


def batch_of(step: int) -> Tensor:
    return torch.randn(IMAGES, 4, generator=torch.Generator().manual_seed(step))


def in_double(gradient: Tensor) -> Tensor:
    """Five steps of the quintic iteration of Jordan et al., in fp64, scaled as they scale it."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return (x * math.sqrt(max(1, gradient.shape[0] / gradient.shape[1]))).float()


def on_one_process(steps: int) -> dict[str, Tensor]:
    """The weights after `steps` of a training without ZeRO."""
    model = fresh()
    matrices = {
        name: param
        for name, param in model.named_parameters()
        if "blocks" in name and name.endswith("weight") and "table" not in name
    }
    assert len(matrices) == 9
    # mmcv looks at longer keys first, and takes one
    factors = {
        name: (0.5, 0.1) if "blocks.0" in name else (1.0, 0.0) if "fc2" in name else (1.0, 0.1)
        for name, _ in model.named_parameters()
    }
    adam = torch.optim.AdamW(
        [
            {"params": [param], "lr": MUON["adam_lr"] * factors[name][0], "weight_decay": factors[name][1]}
            for name, param in model.named_parameters()
            if name not in matrices
        ],
        betas=MUON["betas"],
    )
    momentum = {name: torch.zeros_like(param) for name, param in matrices.items()}
    rates = [group["lr"] for group in adam.param_groups]
    for step in range(steps):
        decayed = SCHEDULE.lr(step, 1.0)
        model.zero_grad()
        model(batch_of(step)).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        for group, rate in zip(adam.param_groups, rates):
            group["lr"] = rate * decayed
        adam.step()
        with torch.no_grad():
            for name, param in matrices.items():
                scale, decay = factors[name]
                rate = MUON["lr"] * scale * decayed
                momentum[name] = MUON["momentum"] * momentum[name] + (1 - MUON["momentum"]) * param.grad
                blend = (1 - MUON["momentum"]) * param.grad + MUON["momentum"] * momentum[name]
                param.copy_(param * (1 - rate * decay) - rate * in_double(blend))
    return {name: param.detach() for name, param in model.named_parameters()}


def train(folder: Path, raw: dict, start: int, stop: int) -> None:
    """From step `start`, whose state is in `folder`, to `stop`, which is saved there."""
    ranks = dist.get_world_size()
    ds = resolve_ds_config(
        {**raw, "gradient_accumulation_steps": ACCUMULATION},
        experiment="",
        micro_batch=IMAGES // ACCUMULATION // ranks,
        world_size=ranks,
        optimizer=MUON,
        gradient_clipping=CLIP,
    )
    with torch.device("meta"):
        meta = Segmentor()
    model = fresh()
    if start:
        saved = ZeroCheckpoint.open(folder)
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(saved.read(name))
    groups = groups_in(model, parameter_groups(meta, MUON), meta)
    optimizer = build_optimizer(groups, MUON, ds)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda given: SCHEDULE.scheduler(scheduled(given)),
        config=ds.raw,
    )
    divide_by_settings(engine, optimizer, groups)
    optimizer.find_matrices(engine, groups)
    if start:
        restore(engine, saved, SCHEDULE)
    for step in range(start, stop):
        for micro in batch_of(step).view(ACCUMULATION, ranks, -1, 4)[:, dist.get_rank()]:
            engine.backward(engine(micro))
            engine.step()
    engine.save_checkpoint(str(folder), tag=f"global_step{stop}")
    dist.barrier()


def under(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


RAWS = {
    "1": under(1),
    "2": under(2),
    "3": under(3),
    "sub-groups": under(3, sub_group_size=150, stage3_param_persistence_threshold=0),
    "fp32 gradients": {**under(1), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def trainings(folder: Path, raws: dict[str, dict], start: int, stop: int) -> None:
    deepspeed.init_distributed(verbose=False)
    for name, raw in raws.items():
        train(folder / name, raw, start, stop)


def agrees(folder: Path, wanted: dict[str, Tensor]) -> None:
    saved = ZeroCheckpoint.open(folder)
    for name, value in wanted.items():
        # 1/1000 of an update: the iteration enlarges the rounding of small singular values by some 500
        torch.testing.assert_close(saved.read(name), value, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    spawn(trainings, 2, folder, {key: RAWS[key] for key in ("1", "2", "3", "sub-groups")}, 0, 2)
    return folder


def test_two_processes_train_as_one_without_zero_under_every_stage(after_two_steps):
    wanted = on_one_process(2)
    for stage in ("1", "2", "3", "sub-groups"):
        agrees(after_two_steps / stage, wanted)


def test_matrices_have_one_moment_and_all_else_two(after_two_steps):
    for stage in ("1", "3", "sub-groups"):
        saved = ZeroCheckpoint.open(after_two_steps / stage)
        assert saved.updates == 2
        assert saved.moments_of("backbone.blocks.1.fc1.weight") == ("momentum_buffer",)
        assert set(saved.moments_of("head.weight")) == {"exp_avg", "exp_avg_sq"}


def test_a_run_goes_on_from_any_stage_with_another_number_of_processes(after_two_steps):
    folder = after_two_steps
    # the folder of each run is that of the stage which it was saved under
    spawn(trainings, 3, folder, {"1": RAWS["sub-groups"], "2": RAWS["3"], "sub-groups": RAWS["2"]}, 2, 4)
    wanted = on_one_process(4)
    for stage in ("1", "2", "sub-groups"):
        agrees(folder / stage, wanted)
