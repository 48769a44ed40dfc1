"""Adam with moments in bf16 and in 8 bits: its updates beside torch's, and its state under every stage of
ZeRO, saved, averaged and gone on from in other formats, under other stages and on other numbers of
processes."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.checkpoints.zero_files import EMA_FILE
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.distributed.zero_internals import fp32_partitions, fragment_of
from internseg_ds.errors import ConfigError
from internseg_ds.optimization import compact_adam
from internseg_ds.optimization.compact_adam import CompactAdam
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.optimization.optimizers import build_optimizer, check_optimizer, scheduled
from internseg_ds.optimization.ranged_adam import MOMENTS, RangedAdam, divide_by_settings
from internseg_ds.optimization.restore import restore
from tests.distributed.ranks import spawn

SECTION = dict(type="AdamW", lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
SCHEDULE = LrSchedule(100, "fixed")
BF16 = {"bf16": {"enabled": True}}
BF16_MASTER = {
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
}
KINDS = {
    "fp32": ("fp32", BF16),
    "bf16": ("bf16", BF16),
    "8bit": ("8bit", BF16),
    "bf16 weights": ("bf16", BF16_MASTER),
    "bf16 weights, 8bit": ("8bit", BF16_MASTER),
    "8bit, fp32 gradients": ("8bit", {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_an_update_is_torchs_own_of_the_moments_that_are_held(monkeypatch, states, dtype, kind):
    """In chunks, with a setting that begins inside of a block."""
    monkeypatch.setattr(compact_adam, "CHUNK", 512)
    n, cut, arguments = 1300, 777, dict(lr=1e-2, weight_decay=0.1)
    flat = nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype))
    ours = CompactAdam(
        [{"params": [flat], "lr": 1e-2}, {"params": [], "lr": 1e-3, "weight_decay": 0.0}],
        kind,
        float("inf"),
        states,
        **arguments,
    )
    ours.divide({flat: [(0, cut, 0), (cut, n, 1)]})
    for step in range(4):
        parts = [nn.Parameter(part.clone()) for part in flat.detach().float().split([cut, n - cut])]
        reference = kind(
            [{"params": parts[:1]}, {"params": parts[1:], "lr": 1e-3, "weight_decay": 0.0}], **arguments
        )
        if step:
            held = {what: ours._moment(flat, what, 0, n).split([cut, n - cut]) for what in MOMENTS}
            for number, part in enumerate(parts):
                reference.state[part] = {
                    "step": torch.tensor(float(step)),
                    **{what: values[number] for what, values in held.items()},
                }
        gradient = torch.randn(n, generator=torch.Generator().manual_seed(step + 1)).to(dtype)
        flat.grad = gradient.clone()
        for part, of_part in zip(parts, gradient.float().split([cut, n - cut]), strict=True):
            part.grad = of_part
        ours.step()
        reference.step()
        wanted = torch.cat([part.detach() for part in parts])
        if dtype == torch.float32:
            torch.testing.assert_close(flat.detach(), wanted, rtol=1e-6, atol=1e-7)
        else:  # one of the two neighbours in bf16, and not always the nearer one
            assert ((flat.detach().float() - wanted).abs() <= wanted.abs() * 2**-7).all()
            assert not torch.equal(flat.detach(), wanted.bfloat16())
        for what, precision in (("exp_avg", 0.126), ("exp_avg_sq", 0.126)):
            exact = torch.cat([reference.state[part][what] for part in parts])
            found = ours._moment(flat, what, 0, n)
            least = 2**-15 * exact.abs().max() if what == "exp_avg" else 0
            assert ((found - exact).abs() <= precision * exact.abs() + least).all(), what
    assert ours.state[flat]["step"] == 4
    assert not ours.settings.state and all(not group["params"] for group in ours.settings.param_groups)


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 37), nn.GELU(), nn.Linear(37, 29))


def resolved(kind: str, stage: int, section: dict = SECTION, **more):
    states, raw = KINDS[kind]
    zero = {"stage": stage, "sub_group_size": 900} if stage == 3 else {"stage": stage}
    return resolve_ds_config(
        {**raw, "zero_optimization": zero, **more},
        experiment="exp.py",
        micro_batch=2,
        world_size=dist.get_world_size() if dist.is_initialized() else 1,
        optimizer=section,
        optimizer_states=states,
    )


def build(model: nn.Module, kind: str, stage: int):
    ds, model = resolved(kind, stage), copy.deepcopy(model)
    groups = [
        {"params": [model[0].weight, model[0].bias], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [model[2].weight, model[2].bias], "lr": 3e-3, "weight_decay": 0.0},
    ]
    optimizer = build_optimizer(groups, SECTION, ds)
    assert isinstance(optimizer, CompactAdam if kind != "fp32" else RangedAdam)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda inner: SCHEDULE.scheduler(scheduled(inner)),
        config=ds.raw,
    )
    divide_by_settings(engine, optimizer, groups)
    return engine


def train(engine, start: int, stop: int) -> None:
    for step in range(start, stop):
        torch.manual_seed(1000 * step + dist.get_rank())
        engine.backward(engine(torch.randn(2, 40).bfloat16()).float().square().mean())
        engine.step()


def state_of(engine) -> dict[str, torch.Tensor]:
    """Of this rank's part of each parameter: weights, exp_avg and exp_avg_sq below each other, in fp32;
    copies. Without DeepSpeed's padding, which it leaves as it was in memory."""
    found, inner, partitions = {}, engine.optimizer.optimizer, fp32_partitions(engine)
    for name, param in engine.module.named_parameters():
        if (fragment := fragment_of(engine, param)) is not None:
            flat = partitions[fragment.partition]
            moments = [
                inner._moment(flat, what, 0, flat.numel())
                if isinstance(inner, CompactAdam)
                else inner.state[flat][what]
                for what in MOMENTS
            ]
            found[name] = torch.stack([each[fragment.in_partition].float() for each in (flat.data, *moments)])
    return found


def held_in_both(engine, *flats: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of this rank's part of each parameter: the elements in each of `flats`, flat tensors like the partitions.
    Not DeepSpeed's padding, which may be anything, NaN too."""
    for param in engine.module.parameters():
        if (fragment := fragment_of(engine, param)) is not None:
            yield tuple(flat[fragment.partition].data[fragment.in_partition] for flat in flats)


def save(engine, folder: Path, step: int, ema: ShardedEma) -> None:
    engine.save_checkpoint(str(folder), tag=f"global_step{step}")
    torch.save(ema.state_dict(), folder / f"global_step{step}" / EMA_FILE.format(rank=dist.get_rank()))
    dist.barrier()


def saved_and_gone_on_from(folder: Path, pairs: list[tuple[str, int]]) -> None:
    """Each kind under its stage: saves after 3 of 5 steps, and a second engine does the last 2 alike."""
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = Model()
    for kind, stage in pairs:
        at = folder / f"{kind} {stage}"
        engine = build(model, kind, stage)
        ema = ShardedEma(engine, 0.5)
        for step in range(3):
            train(engine, step, step + 1)
            ema.update()
        save(engine, at, 3, ema)
        averages = [shard.clone() for shard in ema.shards]
        with ema.in_place_of_weights():
            for flat, average in held_in_both(engine, fp32_partitions(engine), averages):
                assert torch.equal(flat, average.to(flat.dtype)), (kind, stage)
        for before, after in held_in_both(engine, averages, ema.shards):
            assert torch.equal(before, after), (kind, stage)
        train(engine, 3, 5)
        expected = state_of(engine)
        engine.destroy()

        weights = copy.deepcopy(model)
        checkpoint = ZeroCheckpoint.open(at)
        with torch.no_grad():
            for name, param in weights.named_parameters():
                param.copy_(checkpoint.read(name))
        engine = build(weights, kind, stage)
        restore(engine, checkpoint, SCHEDULE)
        again = ShardedEma(engine, 0.5)
        again.restore(checkpoint)
        for before, after in held_in_both(engine, averages, again.shards):
            assert torch.equal(before, after), (kind, stage)
        train(engine, 3, 5)
        for name, state in state_of(engine).items():
            assert torch.equal(state, expected[name]), (kind, stage, name)
        engine.destroy()


@pytest.mark.parametrize(
    "pairs",
    [
        [("8bit", 3), ("bf16 weights", 2)],
        *(
            pytest.param([(kind, stage) for kind in KINDS], marks=pytest.mark.slow, id=f"zero{stage}")
            for stage in (1, 2, 3)
        ),
    ],
)
def test_a_run_goes_on_to_the_last_bit_under_every_stage_with_its_average(pairs, tmp_path):
    spawn(saved_and_gone_on_from, 2, tmp_path, pairs)


def write(folder: Path, sources: list[tuple[str, int]]) -> None:
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = Model()
    for kind, stage in sources:
        engine = build(model, kind, stage)
        train(engine, 0, 3)
        save(engine, folder / f"{kind} {stage}", 3, ShardedEma(engine, 0.5))
        torch.save(state_of(engine), folder / f"{kind} {stage} {dist.get_rank()}.pt")
        engine.destroy()


def read(folder: Path, sources: list[tuple[str, int]], targets: list[tuple[str, int]]) -> None:
    """The weights of each source come back as they are, or rounded to bf16; moments to the precision of the
    coarser format."""
    deepspeed.init_distributed(verbose=False)
    for source, target in itertools.product(sources, targets):
        checkpoint = ZeroCheckpoint.open(folder / f"{source[0]} {source[1]}")
        engine = build(Model(), *target)
        restore(engine, checkpoint, SCHEDULE)
        for name, param in engine.module.named_parameters():
            if (fragment := fragment_of(engine, param)) is None:
                continue
            found = state_of(engine)[name]
            expected = torch.stack(
                [
                    checkpoint.read_slice(name, fragment.start, fragment.stop, what)
                    for what in ("fp32", *MOMENTS)
                ]
            )
            weights = expected[0].bfloat16().float() if "weights" in target[0] else expected[0]
            assert torch.equal(found[0], weights), (source, target, name)
            for ours, wanted, least in zip(found[1:], expected[1:], (2**-15, 2**-31), strict=True):
                if KINDS[target[0]][0] == "fp32":
                    assert torch.equal(ours, wanted), (source, target, name)
                near = 2**-4 * wanted.abs() + least * wanted.abs().max()
                assert wanted.any() and ((ours - wanted).abs() <= near).all(), (source, target, name)
        steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        assert steps == {3.0}
        train(engine, 3, 4)
        engine.destroy()


SOURCES = [("fp32", 3), ("8bit", 1), ("bf16 weights", 2), ("bf16", 1), ("bf16 weights, 8bit", 3)]
TARGETS = [("8bit", 2), ("fp32", 3), ("bf16", 1), ("bf16 weights, 8bit", 3), ("bf16 weights", 1)]


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_another_format_under_another_stage_on_other_ranks(count, tmp_path):
    spawn(write, 2, tmp_path, SOURCES[:count])
    for kind, stage in SOURCES[:count]:  # what is read is what the two ranks held
        states = [torch.load(tmp_path / f"{kind} {stage} {rank}.pt") for rank in range(2)]
        checkpoint = ZeroCheckpoint.open(tmp_path / f"{kind} {stage}")
        for name, param in Model().named_parameters():
            held = torch.cat([state[name] for state in states if name in state], 1)
            for row, what in zip(held, ("fp32", *MOMENTS), strict=True):
                assert torch.equal(checkpoint.read_slice(name, 0, param.numel(), what), row), (
                    kind,
                    name,
                    what,
                )
    spawn(read, 3, tmp_path, SOURCES[:count], TARGETS[: count + 1])


@pytest.mark.parametrize(
    ("section", "raw", "states", "words"),
    [
        (dict(type="SGD"), BF16, "bf16", "'Adam' or 'AdamW'"),
        (dict(type="AdamW", amsgrad=True), BF16, "8bit", "with amsgrad"),
        (dict(type="AdamW"), {**BF16, "offload": True}, "8bit", "drop offload_optimizer"),
        (dict(type="AdamW"), BF16_MASTER, "fp32", "rounded stochastically"),
        (
            dict(type="AdamW"),
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16",
            "all three",
        ),
        (dict(type="AdamW"), {"bf16": {**BF16_MASTER["bf16"], "enabled": False}}, "8bit", "all three"),
        (
            dict(type="AdamW"),
            {**BF16_MASTER, "stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
            "bf16",
            "ZeRO-1",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_together_is_one_error(section, raw, states, words):
    raw = dict(raw)
    zero = {"stage": raw.pop("stage", 3)}
    if raw.pop("offload", False):
        zero["offload_optimizer"] = {"device": "cpu"}
    with pytest.raises(ConfigError, match=words):
        check_optimizer(
            {"lr": 1e-3, **section},
            resolve_ds_config(
                {**raw, "zero_optimization": zero},
                experiment="exp.py",
                micro_batch=1,
                world_size=1,
                optimizer=section,
                optimizer_states=states,
            ),
        )
