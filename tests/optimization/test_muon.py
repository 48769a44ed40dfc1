"""Muon under ZeRO-1, 2 and 3 against the same written out for one process, whose matrices are whole."""

import math
import shutil
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import read_experiment
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.distributed.zero_internals import fp32_partitions
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.block_matrices import block_matrices
from internseg_ds.optimization.matrix_exchange import Matrix, MatrixExchange, Part, owners_of
from internseg_ds.optimization.muon import Muon
from internseg_ds.optimization.optimizers import build_optimizer, check_optimizer, scheduled
from internseg_ds.optimization.parameter_groups import groups_in, parameter_groups
from internseg_ds.optimization.ranged_adam import bundles, divide_by_settings
from internseg_ds.optimization.restore import restore
from internseg_ds.planning.estimator import Estimator
from internseg_ds.planning.zero_memory import model_states
from internseg_ds.planning.zero_settings import ZeroSettings
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

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
            engine.backward(engine(micro.to(ds.param_dtype)))
            engine.step()
    engine.save_checkpoint(str(folder), tag=f"global_step{stop}")
    dist.barrier()


def under(stage: int, **more: object) -> dict:
    return {"zero_optimization": {"stage": stage, **more}}


RAWS = {
    "1": under(1),
    "2": under(2),
    "3": under(3, sub_group_size=150, stage3_param_persistence_threshold=0),
    "bf16": {**under(3), "bf16": {"enabled": True}},
    "fp32 gradients": {**under(1), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def trainings(folder: Path, raws: dict[str, dict], start: int, stop: int) -> None:
    deepspeed.init_distributed(verbose=False)
    for name, raw in raws.items():
        train(folder / name, raw, start, stop)


def agrees(folder: Path, wanted: dict[str, Tensor], atol: float = 2e-5) -> None:
    saved = ZeroCheckpoint.open(folder)
    for name, value in wanted.items():
        # 1/1000 of an update: the iteration enlarges the rounding of small singular values by some 500
        torch.testing.assert_close(saved.read(name), value, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def after_three_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    spawn(trainings, 2, folder, {key: RAWS[key] for key in ("1", "2", "3")}, 0, 3)
    return folder


def test_two_processes_train_as_one_without_zero_under_every_stage(after_three_steps):
    wanted = on_one_process(3)
    for stage in ("1", "2", "3"):
        agrees(after_three_steps / stage, wanted)


def test_matrices_have_one_moment_and_all_else_two(after_three_steps):
    for stage in ("1", "3"):
        saved = ZeroCheckpoint.open(after_three_steps / stage)
        assert saved.updates == 3
        assert saved.moments_of("backbone.blocks.1.fc1.weight") == ("momentum_buffer",)
        assert set(saved.moments_of("head.weight")) == {"exp_avg", "exp_avg_sq"}


def halves_and_whole(folder: Path, ends: dict[str, str]) -> None:
    """Trains on from step 3 to 5 under each stage of `ends`, from the save of its key; and once without a
    break."""
    deepspeed.init_distributed(verbose=False)
    for saved, goes_on in ends.items():
        train(folder / saved, RAWS[goes_on], 3, 5)
    if dist.get_world_size() == 2:
        train(folder / "whole", RAWS["3"], 0, 5)


def test_a_run_goes_on_to_the_last_bit(after_three_steps, tmp_path):
    shutil.copytree(after_three_steps / "3", tmp_path / "3")
    spawn(halves_and_whole, 2, tmp_path, {"3": "3"})
    resumed, whole = (ZeroCheckpoint.open(tmp_path / name) for name in ("3", "whole"))
    for name in whole.trained:
        size = whole.shapes[name].numel()
        for what in ("fp32", *whole.moments_of(name)):
            assert torch.equal(resumed.read_slice(name, 0, size, what), whole.read_slice(name, 0, size, what))


@pytest.mark.parametrize(
    "ends", [{"1": "3"}, pytest.param({"1": "2", "2": "3", "3": "1"}, marks=pytest.mark.slow)], ids=str
)
def test_a_run_goes_on_under_another_stage_with_another_number_of_processes(
    after_three_steps, tmp_path, ends
):
    for saved in ends:
        shutil.copytree(after_three_steps / saved, tmp_path / saved)
    spawn(halves_and_whole, 3, tmp_path, ends)
    wanted = on_one_process(5)
    for saved in ends:
        agrees(tmp_path / saved, wanted, atol=1e-4)


@pytest.mark.slow
def test_zero_1_with_fp32_gradients_of_bf16_weights_trains_as_bf16_allows(tmp_path):
    spawn(trainings, 2, tmp_path, {"1": RAWS["fp32 gradients"], "3": RAWS["bf16"]}, 0, 3)
    wanted, start = on_one_process(3), fresh()
    for stage in ("1", "3"):
        saved = ZeroCheckpoint.open(tmp_path / stage)
        # gradients have 8 bits, and the iteration enlarges what is small in them: most of the way is the same
        way, way_wanted = (
            torch.cat([(each(name) - start.get_parameter(name).detach()).flatten() for name in wanted])
            for each in (saved.read, wanted.__getitem__)
        )
        assert torch.cosine_similarity(way, way_wanted, dim=0) > 0.9
        assert way.norm().item() == pytest.approx(way_wanted.norm().item(), rel=0.1)


@pytest.mark.parametrize("ns_method", ["gram", "standard"])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_an_update_is_that_of_torchs_muon(shape, ns_method):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    reference = torch.optim.Muon([weight], lr=0.1, weight_decay=0.2, momentum=0.9)
    rows, columns = shape
    flat = weight.detach().flatten().clone()
    start = flat.clone()
    group = {"params": [nn.Parameter(flat)], "lr": 0.1, "weight_decay": 0.2, "use_muon": True}
    ours = Muon([group], lr=0.1, momentum=0.9, ns_method=ns_method)
    ours.param_groups[0]["params"] = [flat]
    ours.divide({flat: [(0, flat.numel(), 0)]})
    part = Part(0, 0, 0, flat.numel())
    ours.place({flat: MatrixExchange([Matrix(rows, columns, (part,))], 0, 1)})
    for _ in range(3):
        weight.grad = torch.randn(shape)
        flat.grad = weight.grad.flatten().clone()
        reference.step(), ours.step()
    # torch's iteration is in bf16; without Nesterov's momentum it would be a sixth
    assert (flat - weight.detach().flatten()).norm() < 0.04 * (flat - start).norm()


def test_matrices_are_divided_among_those_that_have_a_part_of_them():
    whole = Matrix(10, 10, (Part(0, 0, 0, 100),))
    divided = Matrix(4, 5, (Part(0, 100, 0, 10), Part(1, 0, 10, 20)))
    assert owners_of([divided, whole, divided, divided], 3) == [1, 0, 1, 1]
    assert owners_of([divided, divided], 2) == [0, 1]


def test_matrices_and_all_else_share_no_group():
    assert bundles([3, 4, 5, 6], 100, [True, False, True, False]) == [[0, 2], [1, 3]]
    assert bundles([3, 4, 5, 6], 7, [True, False, True, False]) == [[0], [2], [1], [3]]


def test_hidden_matrices_of_a_backbone_are_found_and_no_tables_or_adapters():
    from internseg_ds.distributed.construction import build_on_meta

    model = build_on_meta(read_experiment(ROOT / TINY).model)
    names = {name for name, param in model.named_parameters() if param in block_matrices(model)}
    layers = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    blocks = len(model.backbone.blocks)
    assert names == {f"backbone.blocks.{number}.{layer}" for number in range(blocks) for layer in layers}


ADAMW_LRS = [(None, 2e-2), (1e-3, 1e-3), (0.0, 0.0)]


@pytest.mark.parametrize(("adam_lr", "rate"), ADAMW_LRS)
def test_all_else_has_adam_lr_scaled_as_the_constructor_scales_lr(adam_lr, rate):
    groups = parameter_groups(Segmentor(), {**MUON, "adam_lr": adam_lr})
    found = {(group["use_muon"], round(group["lr"], 9), group["weight_decay"]) for group in groups}
    matrices = {(True, 1e-2, 0.1), (True, 2e-2, 0.1), (True, 2e-2, 0.0)}
    assert found == matrices | {(False, rate / 2, 0.1), (False, rate, 0.1), (False, rate, 0.0)}


@pytest.mark.parametrize(
    ("section", "zero", "words"),
    [
        ({"momentum": 1.0}, {}, "momentum=1.0 must be at least 0 and below 1"),
        ({"ns_method": "gramm"}, {}, "must be 'gram' or 'standard'"),
        ({"moment": 0.9}, {}, "moment"),
        ({"limit": 3}, {}, "limit"),
        ({"betas": (2, 3)}, {}, "beta"),
        ({}, {"offload_optimizer": {"device": "cpu"}}, "drop offload_optimizer"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_an_error(section, zero, words):
    section = {**MUON, **section}
    ds = resolve_ds_config(
        {"zero_optimization": {"stage": 3, **zero}},
        experiment="",
        micro_batch=1,
        world_size=2,
        optimizer=section,
    )
    with pytest.raises(ConfigError, match=words):
        check_optimizer(section, ds)


@pytest.mark.parametrize(
    ("section", "frozen", "words"),
    [
        ({"lr": 0.0}, False, "beside an lr above 0"),
        ({"adam_lr": -1}, False, "adam_lr=-1 must be"),
        ({"adam_lr": "auto"}, False, "adam_lr='auto' must be"),
        ({}, True, "of Backbone none of these trains"),
    ],
    ids=str,
)
def test_groups_that_cannot_be_are_an_error(section, frozen, words):
    model = Segmentor()
    model.backbone.requires_grad_(not frozen)
    with pytest.raises(ConfigError, match=words):
        parameter_groups(model, {**MUON, **section})


def goes_on_in_the_engine(root: Path, work_dir: Path, raw: dict) -> None:
    from internseg_ds import SegmentorEngine

    experiment = small_experiment(
        root,
        "runner.max_iters=4",
        "model.backbone.freeze_vit=False",
        "checkpoint_config.interval=2",
        "optimizer.type=Muon",
        "optimizer.adam_lr=1e-4",
        "engine.ema=0.9",
    )
    masters = []
    for part in ("whole", "resumed"):
        with SegmentorEngine(
            experiment, raw, work_dir=work_dir / "run", resume="auto" if masters else None, validate=False
        ) as engine:
            assert engine.state.step == (2 if masters else 0)
            engine.train()
            optimizer = engine.deepspeed.optimizer.optimizer
            kinds = {tuple(sorted(optimizer.state[flat])) for flat in fp32_partitions(engine.deepspeed)}
            assert kinds == {("momentum_buffer", "step"), ("exp_avg", "exp_avg_sq", "step")}
            kept = [
                tensor
                for flat in fp32_partitions(engine.deepspeed)
                for tensor in (flat, *optimizer.state[flat].values())
            ]
            estimator = Estimator(engine.plan.experiment, engine.plan.meta_model)
            states = model_states(estimator.model, ZeroSettings.of(engine.plan.ds), estimator.matrices)
            (estimated,) = (part.device for part in states if part.name == "optimizer")
            assert sum(tensor.nbytes for tensor in kept) == pytest.approx(estimated, rel=2e-3)
            masters.append([flat.detach().clone() for flat in fp32_partitions(engine.deepspeed)])
        if dist.get_rank() == 0 and part == "whole":
            shutil.rmtree(work_dir / "run/checkpoints/iter_4")
            (work_dir / "run/checkpoints/latest").write_text("iter_2")
        dist.barrier()
    assert all(torch.equal(one, other) for one, other in zip(*masters, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_real_backbone_goes_on_to_the_last_bit(ade20k, tmp_path, stage):
    spawn(goes_on_in_the_engine, 2, ade20k, tmp_path, {**under(stage), "bf16": {"enabled": True}})
