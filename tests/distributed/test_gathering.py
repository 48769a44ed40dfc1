"""Whole weights for evaluation, out of engines of every stage and precision, on ranks that run different
numbers of forwards."""

import os

import deepspeed
import torch
import torch.distributed as dist

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.distributed import gathering
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.gathering import copy_fits, whole_segmentor
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.optimization.parameter_groups import parameter_groups
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import plain, small

OPTIMIZER = {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}
SETTINGS = {
    "zero1_bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    "zero2_bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    "zero3_bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
    "zero3_autocast": {
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "zero_optimization": {"stage": 3},
    },
}


def ranks_differ_in_forwards(names: list[str]) -> None:
    deepspeed.init_distributed(verbose=False)
    for name in names:
        forwards_of(name)


def forwards_of(name: str) -> None:
    ranks = dist.get_world_size()
    ds = resolve_ds_config(
        SETTINGS[name], experiment="", micro_batch=1, world_size=ranks, optimizer=OPTIMIZER
    )
    autocast, device, config = ds.precision == "autocast", torch.device("cpu"), small()
    model = build_for_training(config, ds, device, seed=0)
    apply_precision(model, torch.bfloat16 if autocast else torch.float32, autocast=autocast)
    groups = parameter_groups(model, OPTIMIZER)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=ds.raw)
    engine.train()
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    meta = [
        {"ori_shape": (112, 112, 3), "img_shape": (112, 112, 3), "pad_shape": (112, 112, 3), "flip": False}
    ]
    with whole_segmentor(
        engine.module, config, torch.bfloat16 if autocast else torch.float32, device, autocast=autocast
    ) as whole:
        assert not whole.training
        for _ in range(1 + 2 * dist.get_rank()):  # nobody waits for anybody here
            logits = whole.encode_decode(image, meta)
        if ds.stage == 3:
            trained, found = dict(engine.module.named_parameters()), dict(whole.named_parameters())
            same = [found[name].data_ptr() == param.ds_tensor.data_ptr() for name, param in trained.items()]
            # the only process computes with its partition
            assert all(same) if ranks == 1 else not any(same)
            assert (gathering._bytes_of_copy(engine.module, device) == 0) is (ranks == 1)
    assert engine.module.training

    expected = build_for_training(
        config,
        resolve_ds_config({}, experiment="", micro_batch=1, world_size=1, optimizer=OPTIMIZER),
        device,
        seed=0,
    )
    expected.load_state_dict(
        {
            key: value.bfloat16().to(value.dtype) if value.is_floating_point() and not autocast else value
            for key, value in plain(0).items()
        }
    )
    with torch.no_grad():
        reference = expected.eval().encode_decode(image, meta)
    assert logits.dtype == torch.float32
    # bf16 rounds the weights of the reference too; autocast also rounds what the blocks compute
    torch.testing.assert_close(
        logits, reference, rtol=0, atol=(3e-2 if autocast else 2e-5) * float(reference.abs().max())
    )


def test_ranks_may_run_different_numbers_of_forwards_on_the_trained_weights():
    spawn(ranks_differ_in_forwards, 2, list(SETTINGS))


def test_one_process_copies_no_weights():
    spawn(ranks_differ_in_forwards, 1, ["zero3_bf16", "zero3_autocast"])


def each_is_alone_on_its_host() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    gathering.free_memory = lambda _, processes: 1000 // processes
    assert copy_fits(int(1000 * gathering.ROOM), torch.device("cpu"))
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert not copy_fits(int(1000 * gathering.ROOM), torch.device("cpu"))


def test_a_copy_has_the_memory_of_its_host_divided_by_the_processes_of_that_host():
    spawn(each_is_alone_on_its_host, 2)
