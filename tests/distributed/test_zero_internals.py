"""What the project relies on inside DeepSpeed, one test for each function of zero_internals, on real engines. A
test that fails names the function to look at when DeepSpeed changes."""

import ast
import os
from pathlib import Path
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from internseg_ds.distributed import hang_verdict, zero_internals
from internseg_ds.distributed.extensions import build_extension
from internseg_ds.distributed.zero_internals import (
    COLLECTIVE_FILES,
    NEWTON_SCHULZ,
    NVTX_FILE,
    RUNTIME_FILES,
    SHARED_BUFFER_BYTES,
    catch_recovery_script_errors,
    checkpoint_engine_of,
    copy_master_weights_to_model,
    fp32_partitions,
    fragment_of,
    gather_frozen_where_used,
    inner_optimizer,
    is_partitioned,
    leaf_class_names,
    orthogonalized,
    replace_checkpoint_engine,
    set_step_counters,
    shard_is_only_copy,
    shard_range,
    shared_buffer_file,
    skipped_steps,
    step_count_in_state,
    undivided,
    write_shard,
)
from internseg_ds.models.derived_class import derived_class
from internseg_ds.zero_partition import full_shape
from tests.distributed.ranks import spawn

BF16 = {"bf16": {"enabled": True}}
OPTIMIZERS = {  # one for each of DeepSpeed's classes of ZeRO optimizers
    "zero1": BF16 | {"zero_optimization": {"stage": 1}},
    "zero1_fp32_gradients": BF16
    | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2": BF16 | {"zero_optimization": {"stage": 2}},
    "zero3": BF16 | {"zero_optimization": {"stage": 3, "sub_group_size": 10}},
    "zero3_partitioned_always": BF16
    | {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}
ZERO3 = OPTIMIZERS["zero3_partitioned_always"]
ROWS, COLUMNS = 5, 7
"""Of the matrix: 35 elements, which 2 ranks cannot share evenly."""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.matrix = nn.Parameter(torch.arange(35.0).view(ROWS, COLUMNS))
        self.gain = nn.Parameter(torch.ones(1))  # fewer elements than ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.matrix.T * self.gain).float().square().mean() + 0 * self.frozen.sum()


def config_of(settings: dict) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "zero_allow_untested_optimizer": True,
        **settings,
    }


def engine_of(settings: dict):
    deepspeed.init_distributed(verbose=False)
    config = config_of(settings)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=settings["zero_optimization"]["stage"] == 3):
        model = Tiny()
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine, scale: float = 1.0) -> None:
    for _ in range(engine.gradient_accumulation_steps()):
        x = torch.full((2, COLUMNS), scale, dtype=torch.bfloat16)
        engine.backward(engine(x))
        engine.step()


def whole(param: nn.Parameter) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters([param], enabled=is_partitioned(param)):
        return param.detach().float().clone()


# ---- parameters that ZeRO-3 has partitioned


def knows_partitioned_parameters() -> None:
    assert not is_partitioned(nn.Parameter(torch.ones(2)))
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        assert {is_partitioned(param) for param in engine.module.parameters()} == {"zero3" in name}, name
        engine.destroy()


def test_is_partitioned():
    spawn(knows_partitioned_parameters, 1)


def knows_full_shapes() -> None:
    assert full_shape(nn.Parameter(torch.ones(2, 3))) == (2, 3)
    module = engine_of(ZERO3).module
    assert module.matrix.shape != (ROWS, COLUMNS)  # otherwise nothing is to know
    assert full_shape(module.matrix) == (ROWS, COLUMNS) and full_shape(module.gain) == (1,)


def test_full_shape():
    spawn(knows_full_shapes, 1)


def knows_ranges_of_shards() -> None:
    module, rank = engine_of(ZERO3).module, dist.get_rank()
    assert shard_range(module.matrix) == [(0, 18), (18, 35)][rank]
    assert shard_range(module.gain) == [(0, 1), (1, 1)][rank]
    start, stop = shard_range(module.matrix)
    held = module.matrix.ds_tensor[: stop - start].float()
    assert torch.equal(held, torch.arange(35.0)[start:stop])


def test_shard_range():
    spawn(knows_ranges_of_shards, 2)


def gathers_frozen_parameters_where_used() -> None:
    engine = engine_of(OPTIMIZERS["zero3"])
    frozen, trained = engine.module.frozen, engine.module.gain
    step(engine)
    assert frozen.ds_status.name == trained.ds_status.name == "AVAILABLE"  # by DeepSpeed's own call for each
    gather_frozen_where_used(engine)
    step(engine, 2.0)
    assert frozen.ds_status.name == "NOT_AVAILABLE" and trained.ds_status.name == "AVAILABLE"
    x = torch.ones(2, COLUMNS, dtype=torch.bfloat16)
    engine.backward(engine(x))
    assert frozen.ds_status.name == "AVAILABLE" and torch.equal(frozen.float(), torch.ones(3))
    gather_frozen_where_used(engine_of(OPTIMIZERS["zero1"]))


def test_gather_frozen_where_used():
    spawn(gathers_frozen_parameters_where_used, 2)


def writes_shards() -> None:
    module = engine_of(ZERO3).module
    for param in (module.matrix, module.gain):
        start, stop = shard_range(param)
        write_shard(param, torch.arange(start, stop, dtype=torch.float32) + 100)
    assert torch.equal(whole(module.matrix), torch.arange(100.0, 135.0).view(ROWS, COLUMNS))
    assert whole(module.gain) == 100


def test_write_shard():
    spawn(writes_shards, 2)


def shows_undivided_parameters() -> None:
    matrix, cpu = engine_of(ZERO3).module.matrix, torch.device("cpu")
    own = undivided(matrix, cpu)
    assert undivided(matrix, torch.device("meta")) is None  # as where it is offloaded
    assert undivided(nn.Parameter(torch.ones(2)), cpu) is None
    if dist.get_world_size() > 1:
        assert own is None
        return
    assert torch.equal(own, torch.arange(35.0, dtype=torch.bfloat16).view(ROWS, COLUMNS))
    own.fill_(3.0)  # no copy: what is gathered from now on is this
    assert torch.equal(whole(matrix), torch.full((ROWS, COLUMNS), 3.0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_undivided(ranks):
    spawn(shows_undivided_parameters, ranks)


def knows_other_copies() -> None:
    assert all(shard_is_only_copy(param) for param in engine_of(ZERO3).module.parameters())
    hpz = {"stage": 3, "zero_hpz_partition_size": 2}
    module = engine_of(BF16 | {"zero_optimization": hpz}).module
    whole(module.matrix)  # the copy is made when the parameter is partitioned again
    assert not shard_is_only_copy(module.matrix)


def test_shard_is_only_copy():
    spawn(knows_other_copies, 2)


# ---- the optimizer of ZeRO-1, 2 and 3


def finds_partitions() -> None:
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        step(engine)
        partitions = fp32_partitions(engine)
        assert all(flat.dtype == torch.float32 and flat.dim() == 1 for flat in partitions), name
        assert set(inner_optimizer(engine).state) == set(partitions), name
        if "zero3" in name:
            assert len(partitions) == (2 if "always" not in name else 1), name  # sub-groups
        engine.destroy()


def test_fp32_partitions():
    spawn(finds_partitions, 2)


def finds_fragments() -> None:
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        assert fragment_of(engine, engine.module.frozen) is None
        for param, values in (
            (engine.module.matrix, torch.arange(35.0)),
            (engine.module.gain, torch.ones(1)),
        ):
            found = torch.zeros_like(values)
            if fragment := fragment_of(engine, param):
                flat = fp32_partitions(engine)[fragment.partition]
                found[fragment.start : fragment.stop] = flat.detach()[fragment.in_partition]
            dist.all_reduce(found)
            assert torch.equal(found, values), name
        engine.destroy()


def test_fragment_of():
    spawn(finds_fragments, 2)


def copies_master_weights() -> None:
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        step(engine)
        for flat in fp32_partitions(engine):
            flat.data.fill_(3)
        copy_master_weights_to_model(engine)
        assert (whole(engine.module.matrix) == 3).all() and (whole(engine.module.gain) == 3).all(), name
        loss = engine(torch.ones(2, COLUMNS, dtype=torch.bfloat16))  # modules compute with them, too
        assert float(loss) == (3 * COLUMNS * 3) ** 2, name
        engine.destroy()


def test_copy_master_weights_to_model():
    spawn(copies_master_weights, 2)


def finds_the_optimizer_it_was_given() -> None:
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        assert type(inner_optimizer(engine)) is torch.optim.AdamW, name
        engine.destroy()


def test_inner_optimizer():
    spawn(finds_the_optimizer_it_was_given, 1)


def counts_steps_as_optimizers_do() -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    kernels = mock.patch("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder")  # which take minutes to compile
    for kind, settings in (
        (DeepSpeedCPUAdam, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {}),
    ):
        param = nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        with kernels:
            optimizer = kind([param], **settings)
            optimizer.step()
            optimizer.step()
        count, ours = optimizer.state[param]["step"], step_count_in_state(optimizer, 2, param.device)
        assert type(count) is type(ours) and count == ours == 2, kind


def test_step_count_in_state():
    spawn(counts_steps_as_optimizers_do, 1)


# ---- the engine


def sets_counters(folder: Path) -> None:
    engine = engine_of(OPTIMIZERS["zero2"])
    set_step_counters(engine, steps=7, skipped=2)
    assert skipped_steps(engine) == 2
    step(engine)  # ends with the third of its micro-batches
    assert engine.global_steps == 8 and engine.micro_steps == 24 and engine.global_samples == 8 * 6
    engine.save_checkpoint(str(folder), tag="tag")
    saved = torch.load(folder / "tag/mp_rank_00_model_states.pt", weights_only=False)
    assert (saved["global_steps"], saved["skipped_steps"], saved["global_samples"]) == (8, 2, 48)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_orthogonalized(shape):
    from deepspeed.runtime.zero.muon.original_muon import NS_METHODS

    assert set(NEWTON_SCHULZ) == NS_METHODS
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, singular, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    singular = singular / singular.norm()
    for _ in range(5):  # the iteration changes singular values alone, each by the quintic
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    for method in NEWTON_SCHULZ:
        before = matrix.clone()
        found = orthogonalized(matrix, method)
        assert found.dtype == torch.float32 and torch.equal(matrix, before)
        # in 8 bits on CPUs with bf16
        torch.testing.assert_close(found.double(), u * singular @ v, rtol=0, atol=0.05)


def test_set_step_counters(tmp_path):
    spawn(sets_counters, 1, tmp_path)


def counts_skipped_steps() -> None:
    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        step(engine)
        assert skipped_steps(engine) == 0, name
        if name != "zero1_fp32_gradients":  # whose optimizer looks for no overflow
            step(engine, float("nan"))
            assert skipped_steps(engine) == 1, name
        engine.destroy()


def test_skipped_steps():
    spawn(counts_skipped_steps, 1)


def saves_through_another_writer(folder: Path) -> None:
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    written = []

    class Writer(TorchCheckpointEngine):
        def save(self, state_dict, path: str) -> None:
            written.append(Path(path).name)
            super().save(state_dict, path)

    for name, settings in OPTIMIZERS.items():
        engine = engine_of(settings)
        replace_checkpoint_engine(engine, Writer)
        assert isinstance(checkpoint_engine_of(engine), Writer)
        engine.save_checkpoint(str(folder / name), tag="tag")
        files = {path.name for path in (folder / name / "tag").iterdir()}
        assert files - {"zero_to_fp32.py", "zero_to_torch.py"} == set(written), name
        written.clear()
        engine.destroy()


def test_replace_checkpoint_engine(tmp_path):
    spawn(saves_through_another_writer, 1, tmp_path)


def test_checkpoint_engine_of(tmp_path):
    spawn(saves_through_another_writer, 1, tmp_path)


def goes_on_without_recovery_scripts(folder: Path) -> None:
    engine, reported = engine_of(OPTIMIZERS["zero2"]), []
    catch_recovery_script_errors(engine, lambda *report: reported.append(report))
    engine.save_checkpoint(str(folder / "fine"), tag="tag")
    assert not reported and (folder / "fine/zero_to_fp32.py").is_file()
    (folder / "full/zero_to_fp32.py").mkdir(parents=True)  # where no file can be written
    engine.save_checkpoint(str(folder / "full"), tag="tag")
    ((where, error),) = reported
    assert Path(where) == folder / "full" and isinstance(error, OSError)
    assert (folder / "full/tag/mp_rank_00_model_states.pt").is_file()


def test_catch_recovery_script_errors(tmp_path):
    spawn(goes_on_without_recovery_scripts, 1, tmp_path)


class Inner(nn.Module):
    """A block that a ds_config calls by one of its names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(COLUMNS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def makes_leaves_of_names() -> None:
    from deepspeed.utils import get_z3_leaf_modules

    deepspeed.init_distributed(verbose=False)
    derived = derived_class(Inner, {}, word="Frozen")
    qualified = f"{Inner.__module__}.{Inner.__qualname__}"
    assert leaf_class_names(Inner) == {"Inner", qualified}
    assert leaf_class_names(derived) == {"FrozenInner", qualified}
    for names in ({"Inner"}, {qualified}, {"FrozenInner"}, {"Other"}):
        zero = {"stage": 3, "leaf_module": {"classes": sorted(names), "names": [], "name_suffixes": []}}
        config = config_of(BF16 | {"zero_optimization": zero})
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = nn.Sequential(Inner(), Inner(), nn.Linear(COLUMNS, 1))
        model[1].__class__ = derived
        optimizer = torch.optim.AdamW(model.parameters())
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        expected = [block for block in model.modules() if leaf_class_names(type(block)) & names]
        assert get_z3_leaf_modules(engine.module) == expected, names
        engine.destroy()


def test_leaf_class_names():
    spawn(makes_leaves_of_names, 1)


# ---- collectives on CPUs


def has_a_buffer_of_this_name_and_size() -> None:
    # as deepspeed's launcher does: all ranks are on this host
    os.environ["LOCAL_SIZE"] = str(dist.get_world_size())
    build_extension("ShareMemCommBuilder")
    deepspeed.init_distributed(verbose=False)
    dist.barrier()
    file = shared_buffer_file(dist.get_rank())
    assert SHARED_BUFFER_BYTES - 4096 <= file.stat().st_size <= SHARED_BUFFER_BYTES
    assert len(list(file.parent.glob(f"*_{os.environ['MASTER_PORT']}_*"))) == dist.get_world_size()
    dist.barrier()


def test_shared_buffer_file():
    spawn(has_a_buffer_of_this_name_and_size, 2)


# ---- paths of source files


@pytest.mark.parametrize("part", [COLLECTIVE_FILES, NVTX_FILE, RUNTIME_FILES])
def test_source_files_are_where_stacks_are_looked_for(part):
    import deepspeed.comm.comm
    import deepspeed.runtime.zero.stage3
    import deepspeed.utils.nvtx

    expected = {
        COLLECTIVE_FILES: deepspeed.comm.comm.all_gather_into_tensor,
        NVTX_FILE: deepspeed.utils.nvtx.instrument_w_nvtx(dist.barrier),
        RUNTIME_FILES: deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.get_param_id,
    }[part]
    while hasattr(expected, "__wrapped__"):
        expected = expected.__wrapped__
    assert part in expected.__code__.co_filename
    assert part in (*hang_verdict.IN_COLLECTIVE, *hang_verdict.IN_BACKWARD, NVTX_FILE)


def test_every_function_of_zero_internals_has_a_test_of_its_name():
    tree = ast.parse(Path(zero_internals.__file__).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions == {name.removeprefix("test_") for name in globals()} & functions
