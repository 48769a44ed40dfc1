"""Adapters and frozen blocks under ZeRO: the training of plain PyTorch with peft, from initial values that the
stage does not change."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from mmcv import ConfigDict
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from internseg_ds.config.ds_config import BackboneSizes, DsConfig, resolve_ds_config
from internseg_ds.config.engine_options import EngineOptions
from internseg_ds.distributed.block_hooks import require_input_gradients
from internseg_ds.distributed.construction import (
    build_for_training,
    build_on_meta,
    choose_trained,
    tune_for_training,
)
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.zero_internals import fp32_partitions, inner_optimizer
from internseg_ds.models.repeated_blocks import RepeatedBlock, repeated_block
from internseg_ds.zero_partition import full_shape
from tests.distributed.ranks import spawn

CPU = torch.device("cpu")
MODEL = ConfigDict(
    type="EncoderDecoder",
    backbone=dict(
        type="InternViT6B",
        patch_size=14,
        img_size=28,
        embed_dim=32,
        depth=3,
        num_heads=2,
        with_cp=True,
        use_flash_attn=False,
        out_indices=[2],
    ),
    test_cfg=dict(mode="whole"),
    train_cfg=dict(),
    decode_head=dict(
        type="FCNHead",
        in_channels=32,
        channels=32,
        num_convs=0,
        concat_input=False,
        num_classes=3,
        in_index=-1,
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss"),
    ),
)
LORA = dict(lora=dict(rank=2, alpha=6, targets=["qkv", "fc1"]))


def ds_config(stage: int, block: RepeatedBlock | None = None) -> DsConfig:
    zero: dict = {"stage": stage}
    if stage == 3:
        zero |= {"leaf_module": "auto", "stage3_param_persistence_threshold": 0}
    return resolve_ds_config(
        {"zero_optimization": zero},
        experiment="",
        micro_batch=2,
        world_size=2,
        optimizer={"type": "AdamW"},
        sizes=BackboneSizes(block=block),
    )


def tuned(stage: int, tune: object, seed: int = 0) -> tuple[torch.nn.Module, DsConfig]:
    options = EngineOptions(tune=tune)
    meta_model = build_on_meta(MODEL)
    choose_trained(meta_model, options)
    ds = ds_config(stage, repeated_block(meta_model.backbone))
    model = build_for_training(MODEL, ds, CPU, seed)
    tune_for_training(model, options.tune, meta_model, ds, seed)
    return model, ds


def with_pefts_own_adapters(values: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A whole model that knows nothing of `engine.tune`."""
    model = build_for_training(MODEL, ds_config(1), CPU, seed=0)
    settings = LoraConfig(r=2, lora_alpha=6, target_modules=["qkv", "fc1"], bias="none")
    inject_adapter_in_model(settings, model.backbone)
    model.load_state_dict(values)
    return model


def step_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    torch.manual_seed(10 * step + dist.get_rank())
    labels = torch.randint(0, 3, (2, 1, 28, 28))
    terms = model(return_loss=True, img=torch.randn(2, 3, 28, 28), img_metas=[{}] * 2, gt_semantic_seg=labels)
    return terms["decode.loss_ce"]


def values_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    with gathered(list(params.values())):
        return {name: param.detach().clone() for name, param in params.items()}


def learns_what_peft_does(stage: int) -> None:
    deepspeed.init_distributed(verbose=False)
    model, ds = tuned(stage, LORA)
    plain = with_pefts_own_adapters(values_of(model))
    assert {name for name, param in plain.named_parameters() if not param.requires_grad} == {
        name for name, param in model.named_parameters() if not param.requires_grad
    }
    optimizers = [
        torch.optim.AdamW([param for param in each.parameters() if param.requires_grad], lr=1e-2)
        for each in (plain, model)
    ]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[1], config=ds.raw)
    require_input_gradients(engine.module)
    for step in range(4):
        optimizers[0].zero_grad()
        expected = step_of(plain, step)
        expected.backward()
        for param in plain.parameters():
            if param.requires_grad:
                dist.all_reduce(param.grad)
                param.grad /= 2
        optimizers[0].step()
        found = step_of(engine, step)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        engine.backward(found)
        engine.step()
    for name, value in values_of(engine.module).items():
        torch.testing.assert_close(value, plain.get_parameter(name).data, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_adapters_learn_what_they_do_in_plain_pytorch_with_peft(stage):
    spawn(learns_what_peft_does, 2, stage)


def starts_from_the_same_values() -> None:
    deepspeed.init_distributed(verbose=False)
    untouched = values_of(build_for_training(MODEL, ds_config(1), CPU, seed=0))
    whole, partitioned = (values_of(tuned(stage, LORA)[0]) for stage in (1, 3))
    assert whole.keys() == partitioned.keys()
    for name, value in whole.items():
        assert torch.equal(value, partitioned[name]), name
        if ".lora_B." in name:
            assert not value.any()
        elif ".lora_A." not in name:
            assert torch.equal(value, untouched[name.replace(".base_layer.", ".")]), name
    drawn = [value for name, value in whole.items() if ".lora_A." in name]
    # a linear layer's: uniform, up to 1 / sqrt(inputs)
    assert len(drawn) == 6 and all(0.9 < float(value.abs().max()) * 32**0.5 <= 1 for value in drawn)
    assert not torch.equal(drawn[0], drawn[1])
    other = values_of(tuned(1, LORA, seed=1)[0])
    assert not torch.equal(next(value for name, value in other.items() if ".lora_A." in name), drawn[0])


def test_adapters_start_from_the_same_values_under_every_stage_and_leave_the_others_as_they_are():
    spawn(starts_from_the_same_values, 2)


class Gathered(TorchDispatchMode):
    """Elements that all-gathers bring together inside a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "c10d::_allgather_base_":
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def frozen_weights_cost_their_forward_pass_alone(stage: int) -> None:
    """For each `engine.tune`: how often each block runs in a step, what the backward pass gathers, and the
    optimizer's state."""
    deepspeed.init_distributed(verbose=False)
    for mode, expected_runs in (("head", [1, 1, 1]), (dict(last_blocks=1), [1, 1, 2]), ("all", [2, 2, 2])):
        model, ds = tuned(stage, mode)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        ds.raw["zero_optimization"] |= {"stage3_max_reuse_distance": 13_000, "stage3_prefetch_bucket_size": 0}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds.raw)
        require_input_gradients(engine.module)
        runs = [0] * len(model.backbone.blocks)

        def count(index: int, runs: list[int] = runs) -> None:
            runs[index] += 1

        for index, block in enumerate(model.backbone.blocks):
            block.register_forward_pre_hook(lambda _, __, index=index, count=count: count(index))
        for step in range(2):  # ZeRO-3 looks on in the first
            runs[:] = [0] * len(runs)
            loss = step_of(engine, step)
            with Gathered() as in_backward:
                engine.backward(loss)
            engine.step()
        assert runs == expected_runs, mode
        elements = sum(full_shape(param).numel() for param in trained)
        most = elements + len(trained)  # each is padded to 2 ranks
        assert in_backward.elements <= most * (stage == 3), (mode, in_backward.elements)
        if mode == "all" and stage == 3:  # blocks that train are gathered again
            first_block = sum(full_shape(param).numel() for param in model.backbone.blocks[0].parameters())
            assert in_backward.elements >= first_block, in_backward.elements
        frozen = [param for param in model.parameters() if not param.requires_grad]
        assert all(param.grad is None for param in frozen)
        # of 2 ranks each holds half of the master weights, padded, and of the two moments as much each
        held = sum(partition.numel() for partition in fp32_partitions(engine))
        assert elements / 2 <= held <= most / 2 + 1, mode
        state = inner_optimizer(engine).state.values()
        moments = sum(entry[key].numel() for entry in state for key in ("exp_avg", "exp_avg_sq"))
        assert moments == 2 * held, mode
        engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_frozen_costs_its_forward_pass_alone(stage):
    spawn(frozen_weights_cost_their_forward_pass_alone, 2, stage)
