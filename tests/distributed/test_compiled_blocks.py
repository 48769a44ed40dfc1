"""Compiled blocks under the ZeRO stages: DeepSpeed's hooks gather, release and reduce around what is compiled.

All but the slow test leave out the last part of compiling, from graphs to machine code, which takes minutes."""

import logging
from pathlib import Path

import deepspeed
import pytest
import torch
from torch._dynamo.utils import counters

from internseg_ds import SegmentorEngine
from internseg_ds.config.experiment import read_experiment
from internseg_ds.models.activation_checkpointing import set_recomputation
from internseg_ds.models.block_execution.compiled_blocks import compile_blocks
from internseg_ds.models.repeated_blocks import block_names
from internseg_ds.monitoring.run_log import begin_log
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn
from tests.distributed.test_activation_checkpointing import LEAF, TIGHT, options
from tests.small_experiment import first_batch

GRAPHS = "aot_eager_decomp_partition"
"""torch.compile's backend that traces and divides graphs into forward and backward, and compiles nothing."""


def small_engine(root: Path, work_dir: Path, zero: dict, **more: object) -> SegmentorEngine:
    settings = options(root, **{"engine.backbone_dtype": "float32", "engine.recomputation": "none", **more})
    return SegmentorEngine(
        read_experiment(ROOT / TINY, settings),
        {"bf16": {"enabled": True}, "zero_optimization": zero},
        work_dir=work_dir,
        validate=False,
    )


def stepper(engine: SegmentorEngine):
    """A function that trains one step on one batch, under learning rate 0, and returns the loss and the norm of
    all gradients. Random numbers start anew in each."""
    batch = first_batch(engine)
    engine.deepspeed.train()

    def step() -> tuple[float, float]:
        torch.manual_seed(3)
        loss = engine.forward(batch)["loss"]
        engine.deepspeed.backward(loss)
        engine.deepspeed.step()
        return loss.item(), float(engine.deepspeed.get_global_grad_norm())

    return step


def compiled_as_uncompiled(
    settings: list[dict], policies: tuple, drop_path: float, root: Path, work_dir: Path
) -> None:
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    for zero in settings:
        more = {"model.backbone.drop_path_rate": drop_path}
        with small_engine(root, work_dir, zero, **more) as engine:
            step, model = stepper(engine), engine.deepspeed.module
            expected = [step() for _ in range(2)][-1]
            names = list(model.state_dict())
            compile_blocks(model.backbone, block_names(engine.plan.meta_model.backbone), backend=GRAPHS)
            assert list(model.state_dict()) == names
            for policy in policies:
                set_recomputation(model, policy)
                # a policy's first step compiles; ZeRO-3 looks on in the first, and gathers ahead in the third
                found = [step()]
                graphs = counters["stats"]["unique_graphs"]
                found += [step() for _ in range(2)]
                assert counters["stats"]["unique_graphs"] == graphs > 0
                assert not counters["graph_break"]
                for numbers in found:
                    assert numbers == pytest.approx(expected, rel=1e-5), (zero, policy)


@pytest.mark.parametrize(
    ("settings", "policies", "drop_path"),
    [
        ([{"stage": 3, **TIGHT, **LEAF}], ("none",), 0.0),
        pytest.param(
            [{"stage": 1}, {"stage": 2}, {"stage": 3, **TIGHT, **LEAF}],
            ("none", "blocks", 2, "all_but_matmuls"),
            0.5,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_losses_and_gradients_are_those_of_uncompiled_blocks_and_nothing_is_compiled_twice(
    settings, policies, drop_path, ade20k, tmp_path
):
    spawn(compiled_as_uncompiled, 2, settings, policies, drop_path, ade20k, tmp_path / "run")


def the_option(zero: dict, root: Path, work_dir: Path) -> None:
    begin_log()
    deepspeed.init_distributed("gloo", verbose=False)
    found = []
    for compiled in (False, True):
        more = {"engine.compile": compiled, "model.backbone.drop_path_rate": 0.0}
        with small_engine(root, work_dir / str(compiled), zero, **more) as engine:
            step = stepper(engine)
            found.append([step() for _ in range(3)][-1])
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3, **TIGHT, **LEAF}])
def test_the_option_compiles_to_machine_code_and_gives_the_same_losses(zero, ade20k, tmp_path):
    spawn(the_option, 2, zero, ade20k, tmp_path / "run")


def hooks_on_layers(root: Path, work_dir: Path) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("internseg_ds.distributed.block_hooks").addHandler(handler)
    with small_engine(root, work_dir, {"stage": 3}, **{"engine.compile": True}) as engine:
        blocks = engine.deepspeed.module.backbone.blocks
    assert len([line for line in lines if '"leaf_module": "auto"' in line]) == 1
    assert not any(hasattr(block, "keeps_matmuls") for block in blocks)


def test_with_hooks_on_layers_nothing_is_compiled_and_one_line_says_what_to_set(ade20k, tmp_path):
    spawn(hooks_on_layers, 1, ade20k, tmp_path / "run")
