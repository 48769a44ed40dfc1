"""Activation checkpointing under the ZeRO stages: DeepSpeed's hooks gather, release and reduce inside blocks
that run a second time."""

from collections import Counter
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_set_full_fp32_param
from torch import nn

from internseg_ds import SegmentorEngine
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import ConfigError
from internseg_ds.models.activation_checkpointing import set_recomputation
from internseg_ds.models.repeated_blocks import repeated_blocks
from internseg_ds.monitoring.run_log import begin_log
from tests.conftest import ROOT, TIMM, TINY, TRANSFORMERS, data_options
from tests.distributed.ranks import spawn
from tests.end_to_end.conftest import SMALLER
from tests.small_experiment import first_batch

TIGHT = {
    "stage3_param_persistence_threshold": 320,
    "stage3_max_reuse_distance": 20_000,
    "stage3_prefetch_bucket_size": 5_000,
    "reduce_bucket_size": 30_000,
}
"""Most weights are gathered twice at this model's size, and gradients reduced in several buckets."""
LEAF = {"leaf_module": "auto"}
"""DeepSpeed's hooks sit on whole blocks, which are gathered as one."""


def options(root: Path, config: str = TINY, **more: object) -> dict[str, object]:
    import ast

    given = dict(option.split("=", 1) for option in (*SMALLER[config], *data_options(root)))
    return {key: value if "data_root" in key else ast.literal_eval(value) for key, value in given.items()} | {
        "data.workers_per_gpu": 0,
        "optimizer.lr": 0.0,
        "model.backbone.drop_path_rate": 0.5,
        **more,
    }


def every_policy_is_equal(settings: list[tuple[dict, dict]], root: Path, work_dir: Path) -> None:
    """On each rank, for (zero_optimization, options of the experiment): the loss and the norm of all
    gradients of one batch, again and again under learning rate 0."""
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    by_layer = {}
    for zero, more in settings:
        experiment = read_experiment(ROOT / TINY, options(root, **more))
        with SegmentorEngine(
            experiment,
            {"bf16": {"enabled": True}, "zero_optimization": zero},
            work_dir=work_dir,
            validate=False,
        ) as engine:
            batch = first_batch(engine)
            engine.deepspeed.train()

            def step(engine=engine, batch=batch) -> tuple[float, float]:
                loss = engine.forward(batch)["loss"]
                engine.deepspeed.backward(loss)
                engine.deepspeed.step()
                return loss.item(), float(engine.deepspeed.get_global_grad_norm())

            for name, param in engine.deepspeed.module.named_parameters():
                # they start from 0, which hides that one was added twice
                if name.endswith(".bias") and param.requires_grad:
                    safe_set_full_fp32_param(param, torch.full(getattr(param, "ds_shape", param.shape), 0.1))
            step()
            found = {}
            for policy in ("none", "blocks", 2, "all_but_matmuls"):
                set_recomputation(engine.deepspeed.module, policy)
                # ZeRO-3 looks on in the first, records the second, and gathers ahead in the third
                for _ in range(3):
                    found.setdefault(policy, []).append(step())
            assert len({pair for pairs in found.values() for pair in pairs}) == 1, f"{zero}, {more}: {found}"
            assert found["none"][0][1] > 0
            if not more:
                by_layer = by_layer or found
                assert found == by_layer, f"{zero}: {found}, {by_layer}"


@pytest.mark.parametrize(
    "settings",
    [
        [({"stage": 3, **TIGHT}, {}), ({"stage": 3, **TIGHT, **LEAF}, {})],
        pytest.param(
            [({"stage": 3, **TIGHT, **LEAF}, {"model.backbone.freeze_vit": True})], marks=pytest.mark.slow
        ),
    ],
)
def test_every_policy_gives_the_same_losses_and_gradient_norms_with_hooks_on_layers_and_on_blocks(
    settings, ade20k, tmp_path
):
    spawn(every_policy_is_equal, 2, settings, ade20k, tmp_path / "run")


def blocks_run_again(config: str, root: Path, work_dir: Path) -> None:
    """How often each block runs in one step, under each policy."""
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    experiment = read_experiment(ROOT / config, options(root, config))
    stage3 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with SegmentorEngine(experiment, stage3, work_dir=work_dir, validate=False) as engine:
        batch = first_batch(engine)
        model = engine.deepspeed.module
        runs: Counter[nn.Module] = Counter()
        blocks = repeated_blocks(model.backbone)
        for block in blocks:
            block.register_forward_pre_hook(lambda module, _: runs.update([module]))
        model.train()
        for policy, expected in (
            ("none", [1, 1, 1, 1]),
            ("blocks", [2, 2, 2, 2]),
            (2, [2, 1, 2, 1]),
            ("all_but_matmuls", [2, 2, 2, 2]),
        ):
            set_recomputation(model, policy)
            runs.clear()
            engine.deepspeed.backward(engine.forward(batch)["loss"])
            engine.deepspeed.step()
            assert [runs[block] for block in blocks] == expected, policy


@pytest.mark.parametrize("config", [TINY, TIMM, TRANSFORMERS])
def test_what_zero3_has_partitioned_recomputes_as_its_policy_says(config, ade20k, tmp_path):
    """Blocks are found while a model is built, when their parameters are partitioned already."""
    spawn(blocks_run_again, 1, config, ade20k, tmp_path / "run")


def test_a_policy_that_is_none_is_one_sentence(ade20k, tmp_path):
    experiment = read_experiment(ROOT / TINY, options(ade20k, **{"engine.recomputation": "some"}))
    with pytest.raises(ConfigError, match="recomputation='some' cannot be"):
        SegmentorEngine(experiment, {"zero_optimization": {"stage": 1}}, work_dir=tmp_path)
