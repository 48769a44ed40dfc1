"""The estimated bytes of training state against those of real engines: every tensor that lives after a backward
pass and after a step is found and summed."""

import ast
import gc
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist

from internseg_ds import SegmentorEngine
from internseg_ds.config.experiment import read_experiment
from internseg_ds.monitoring.run_log import begin_log
from internseg_ds.optimization.parameter_groups import parameter_groups
from internseg_ds.planning.zero_memory import model_states, temporary_buffers
from internseg_ds.planning.zero_settings import ZeroSettings
from tests.conftest import ROOT, TINY, data_options
from tests.distributed.ranks import spawn
from tests.small_experiment import first_batch

BUCKET = 300_000
PASSING = ("gradients being sent", "gathered weights", "gradients of one micro-batch", "whole gradients")
"""What is there during a backward pass and not after it."""
BACKBONE = {
    "data.samples_per_gpu": 2,
    "data.workers_per_gpu": 0,
    "engine.backbone_dtype": "float32",
    "engine.ema": 0.9,
}


def living() -> dict[int, torch.UntypedStorage]:
    """Each storage that a tensor of this process holds, by its address."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {
        tensor.untyped_storage()._cdata: tensor.untyped_storage()
        for tensor in found
        if tensor.device.type != "meta"
    }


def count_and_compare(settings: list[tuple[dict, int, str]], root: Path, work_dir: Path) -> None:
    """On each rank: trains under each of (ds_config, accumulation, engine.optimizer_states), and compares
    what lives after a backward pass and after a step with the estimate."""
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    n = dist.get_world_size()
    for ds_config, accumulation, states in settings:
        options = {
            **{
                key: ast.literal_eval(value) if "data_root" not in key else value
                for key, value in (option.split("=", 1) for option in data_options(root))
            },
            **BACKBONE,
            "engine.global_batch": 2 * n * accumulation,
            "engine.optimizer_states": states,
        }
        before = living()
        with SegmentorEngine(
            read_experiment(ROOT / TINY, options), ds_config, work_dir=work_dir, validate=False
        ) as engine:
            ema = sum(shard.nbytes for shard in engine.ema.shards)
            engine.deepspeed.train()
            batch = first_batch(engine)
            counted = {}
            for _ in range(2 * accumulation):
                engine.deepspeed.backward(engine.forward(batch)["loss"])
                counted["train"] = summed(before)
                engine.deepspeed.step()
            counted["evaluate"] = summed(before)
            model, ds = engine.plan.meta_model, engine.plan.ds
            groups = [
                sum(param.numel() for param in group["params"])
                for group in parameter_groups(model, engine.plan.experiment.optimizer)
            ]
            settings = ZeroSettings.of(ds)
            estimated = [
                *model_states(model, settings),
                *temporary_buffers(model, settings, groups, None),
            ]
            for phase, found in counted.items():
                lasting = [
                    part
                    for part in estimated
                    if phase in part.phases
                    and part.name not in PASSING
                    and not (part.name == "communication buckets" and ds.stage < 3)
                ]
                expected = sum(part.device + part.host for part in lasting) + sum(
                    part.nbytes for part in batch.inputs.values() if isinstance(part, torch.Tensor)
                )
                assert found - ema == pytest.approx(
                    expected, rel=0.08 if phase == "train" and ds.stage < 3 else 0.03
                ), f"{ds_config}, {accumulation}, {states}, {n} ranks, {phase}: {lasting}"


def summed(before: dict[int, torch.UntypedStorage]) -> int:
    """Bytes that live, except for those of `before`, which are kept so that none of their addresses is used
    again."""
    return sum(storage.nbytes() for address, storage in living().items() if address not in before)


def config(precision: str, **zero) -> dict:
    return {
        precision: {"enabled": True},
        "zero_optimization": {
            "reduce_bucket_size": BUCKET,
            "contiguous_gradients": True,
            "overlap_comm": True,
            **(RELEASING if zero["stage"] == 3 else {}),
            **zero,
        },
    }


def with_bf16_weights(**zero) -> dict:
    raw = config("bf16", **zero)
    raw["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return raw


RELEASING = {
    "stage3_param_persistence_threshold": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 1,
}
OFFLOADED = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [
            (config("bf16", stage=1), 1, "fp32"),
            (config("bf16", stage=2), 2, "fp32"),
            (config("torch_autocast", stage=3), 1, "fp32"),
            (config("bf16", **OFFLOADED), 2, "fp32"),
        ],
        [
            (config("bf16", stage=1), 1, "8bit"),
            (config("bf16", stage=3), 2, "bf16"),
            (with_bf16_weights(stage=2), 2, "bf16"),
            (with_bf16_weights(stage=3), 1, "8bit"),
        ],
    ],
    ids=["fp32", "fewer bytes"],
)
def test_estimated_state_is_what_lives_in_a_real_engine(settings, ade20k, tmp_path):
    """Within 3 %; while ZeRO-1 and 2 hold gradients, within 8 %, for the parameters that two ranks share are
    small here, but not beside the whole."""
    spawn(count_and_compare, 2, settings, ade20k, tmp_path / "run")
