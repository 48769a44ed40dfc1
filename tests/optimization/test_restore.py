"""Checkpoints of every kind, restored into engines of other stages, precisions and numbers of processes: the
same masters, moments and rates, to the last bit."""

from pathlib import Path

import deepspeed
import pytest
import torch

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.checkpoints.zero_files import EMA_FILE
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.distributed.zero_internals import fragment_of
from internseg_ds.optimization.ema import ShardedEma
from internseg_ds.optimization.restore import restore
from tests.checkpoints.write_toy_checkpoints import SETTINGS, build, truth
from tests.distributed.ranks import spawn

TARGETS = [
    "zero1_bf16",
    "zero1_bf16_fp32_gradients",
    "zero2_bf16",
    "zero2_offload",
    "zero3_bf16",
    "zero3_small_sub_groups",
    "zero3_offload",
    "zero3_autocast",
    "zero3_fp32",
]


def engine_of(name: str, schedule: LrSchedule):
    engine = build(*SETTINGS[name])
    engine.lr_scheduler = schedule.scheduler(
        engine.optimizer.optimizer if hasattr(engine.optimizer, "optimizer") else engine.optimizer
    )
    return engine


def every_checkpoint_into_every_engine(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    schedule = LrSchedule(max_steps=10, settings=dict(warmup="linear", warmup_iters=4))
    for target in TARGETS:
        engine = engine_of(target, schedule)
        for source in SETTINGS:
            expected = torch.load(folder / source / "truth.pt")["global_step2"]
            restore(engine, ZeroCheckpoint.open(folder / source, "global_step2"), schedule)
            found = truth(engine)
            for what in ("fp32", "exp_avg", "exp_avg_sq"):
                for name, param in engine.module.named_parameters():
                    if param.requires_grad:
                        assert torch.equal(found[what][name].float(), expected[what][name].float()), (
                            source,
                            target,
                            what,
                            name,
                        )
            rates = [group["lr"] for group in engine.optimizer.optimizer.param_groups]
            assert rates == pytest.approx([schedule.lr(2, base) for base in (0.1, 0.01, 0.003)])
            steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
            assert steps == {2.0}
        engine.destroy()


# saved by 2
@pytest.mark.parametrize(
    "world_size", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_every_checkpoint_is_restored_into_every_engine(world_size, toy_checkpoints):
    spawn(every_checkpoint_into_every_engine, world_size, toy_checkpoints)


def train_step(engine, seed: int) -> float:
    torch.manual_seed(seed)
    x = torch.randn(4, 7).to(engine.device, next(engine.module.parameters()).dtype)
    loss = engine(x)
    engine.backward(loss)
    engine.step()
    return float(loss)


def the_average_is_kept_swapped_saved_and_restored(folder: Path) -> None:
    deepspeed.init_distributed(verbose=False)
    schedule = LrSchedule(max_steps=100)
    for name in ("zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_autocast"):
        engine = engine_of(name, schedule)
        ema = ShardedEma(engine, 0.9)
        expected = {key: value.double() for key, value in truth_fp32(engine).items()}
        for step in range(3):
            train_step(engine, step)
            ema.update()
            expected = {
                key: value + 0.1 * (now.double() - value)
                for (key, value), now in zip(expected.items(), truth_fp32(engine).values(), strict=True)
            }
        weights, x = (
            truth_fp32(engine),
            torch.randn(4, 7, generator=torch.Generator().manual_seed(9)).to(
                engine.device, next(engine.module.parameters()).dtype
            ),
        )
        engine.eval()
        before = engine(x).detach().clone()
        with ema.in_place_of_weights():
            for key, value in truth_fp32(engine).items():
                torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
            assert not torch.equal(engine(x), before)
        assert all(torch.equal(value, weights[key]) for key, value in truth_fp32(engine).items())
        assert torch.equal(engine(x), before)  # the copies that modules compute with came back too

        engine.save_checkpoint(str(folder / name), tag="global_step3")
        torch.save(
            ema.state_dict(),
            folder / name / "global_step3" / EMA_FILE.format(rank=torch.distributed.get_rank()),
        )
        torch.distributed.barrier()
        checkpoint = ZeroCheckpoint.open(folder / name)
        for key, value in expected.items():
            torch.testing.assert_close(
                checkpoint.read_slice(key, 0, value.numel(), "ema").double(),
                value.flatten(),
                rtol=1e-5,
                atol=1e-6,
            )
        other = ShardedEma(engine, 0.9)
        other.restore(checkpoint)
        for param in engine.module.parameters():
            if fragment := fragment_of(engine, param):  # padding may differ
                mine, again = (
                    each.shards[fragment.partition][fragment.in_partition] for each in (ema, other)
                )
                assert torch.equal(mine, again)
        engine.destroy()


def truth_fp32(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(param).cpu().clone()
        for name, param in engine.module.named_parameters()
        if param.requires_grad
    }


def test_the_average_is_kept_swapped_saved_and_restored(tmp_path):
    spawn(the_average_is_kept_swapped_saved_and_restored, 2, tmp_path)
