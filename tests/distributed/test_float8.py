"""Products in float8 under the ZeRO stages, on CPUs, which multiply float8 too (slowly; the option is for GPUs)."""

from pathlib import Path

import deepspeed
import pytest
import torch

from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.precision import ComputeDtypes, check_float8
from internseg_ds.errors import ConfigError
from internseg_ds.models.block_execution.float8_linear import multiply_in_float8
from internseg_ds.models.repeated_blocks import block_names
from internseg_ds.monitoring.run_log import begin_log
from tests.distributed.ranks import spawn
from tests.distributed.test_activation_checkpointing import LEAF, TIGHT
from tests.distributed.test_compiled_blocks import small_engine, stepper
from tests.small_experiment import small_experiment

STEPS = 3
BF16 = ComputeDtypes(torch.bfloat16, torch.float32)


def losses(zero: dict, root: Path, work_dir: Path, float8: bool) -> list[float]:
    more = {
        "engine.backbone_dtype": "bfloat16",
        "optimizer.lr": 1e-3,
        "lr_config.warmup_iters": 1,
        "model.backbone.drop_path_rate": 0.0,
        "model.backbone.depth": 4,
    }
    with small_engine(root, work_dir, zero, **more) as engine:
        model = engine.deepspeed.module
        names = list(model.state_dict())
        if float8:
            # 4 blocks of qkv, proj, fc1 and fc2
            assert multiply_in_float8(model.backbone, block_names(engine.plan.meta_model.backbone)) == 16
        step = stepper(engine)
        found = [step()[0] for _ in range(STEPS)]
        assert list(model.state_dict()) == names
        return found


def float8_follows_bf16(stages: list[dict], root: Path, work_dir: Path) -> None:
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    expected = losses(stages[0], root, work_dir / "bf16", float8=False)
    assert expected[-1] < expected[0]
    for index, zero in enumerate(stages):
        found = losses(zero, root, work_dir / str(index), float8=True)
        assert found == pytest.approx(expected, rel=0.01), (zero, found, expected)
        # 3 bits of mantissa show
        assert found != expected


@pytest.mark.parametrize(
    "stages",
    [
        [{"stage": 3, **TIGHT, **LEAF}],
        pytest.param(
            [{"stage": 1}, {"stage": 2}, {"stage": 3, **TIGHT}, {"stage": 3, **TIGHT, **LEAF}],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_follow_those_of_bf16(stages, ade20k, tmp_path):
    spawn(float8_follows_bf16, 2, stages, ade20k, tmp_path / "run")


def test_what_cannot_multiply_float8_is_one_sentence(ade20k, monkeypatch):
    model = build_on_meta(small_experiment(ade20k).model)
    options, gpu = EngineOptions(matmul_dtype="float8"), torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"this run is on the CPU; set engine.matmul_dtype='bfloat16'"):
        check_float8(options, model, BF16, torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(ConfigError, match=r"compute capability 8.9\), and this run is on an A100"):
        check_float8(options, model, BF16, gpu, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(options, model, BF16, gpu, "bf16")
    with pytest.raises(ConfigError, match="needs bf16 weights and a backbone that computes in bf16"):
        check_float8(options, model, BF16, gpu, "autocast")
    with pytest.raises(ConfigError, match="needs bf16 weights and a backbone that computes in bf16"):
        check_float8(options, model, ComputeDtypes(torch.float32, torch.float32), gpu, "bf16")
    odd = small_experiment(ade20k, "model.backbone.embed_dim=24", "model.backbone.mlp_ratio=1.5").model
    with pytest.raises(ConfigError, match="no repeated block of InternViT6B has a linear layer"):
        check_float8(options, build_on_meta(odd), BF16, gpu, "bf16")
    check_float8(EngineOptions(), model, BF16, torch.device("cpu"), "bf16")
