"""Heads with parameters that others read, collectives in their loss, modules that run inside the backbone, and
ranks without targets, under the real DeepSpeed engine."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from mmcv import ConfigDict

from internseg_ds.distributed.construction import build_for_training
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.distributed.precision import apply_precision
from tests.distributed.ranks import spawn
from tests.distributed.test_construction import ds_config
from tests.models.eomt.small_eomt import config as eomt_config
from tests.models.mask2former.small_mask2former import config, targets

STEPS = 2
SIDE = 56
ADAMW = {"lr": 1e-2, "eps": 1e-3}
"""The eps is above the rounding errors that the biases of keys, on which no attention depends, have in place
of gradients."""


def mask2former() -> ConfigDict:
    model = config()
    model.backbone.update(embed_dim=32, num_heads=2, drop_path_rate=0.0, img_size=SIDE, pretrain_size=SIDE)
    model.decode_head.in_channels = [32] * 4
    return model


def eomt() -> ConfigDict:
    return eomt_config(model_name="vit_small_patch14_reg4_dinov2", with_cp=True)


MODELS = {"mask2former": mask2former, "eomt": eomt}


def batch(step: int, rank: int) -> dict:
    """Two images of this rank. In the second step, rank 1 has no masks at all."""
    classes = [[0, 3], [2]] if rank == 0 else [[1], []] if step == 0 else [[], []]
    labels, masks = targets(*classes, size=SIDE)
    torch.manual_seed(10 * step + rank)
    return {
        "img": torch.randn(2, 3, SIDE, SIDE),
        "img_metas": [{}] * 2,
        "gt_semantic_seg": torch.zeros(2, 1, SIDE, SIDE, dtype=torch.int64),
        "gt_labels": labels,
        "gt_masks": masks,
    }


def losses_of(model, step: int) -> dict[str, torch.Tensor]:
    if hasattr(module := getattr(model, "module", model), "at_step"):
        module.at_step(step, 6)  # EoMT: in the second step, some queries of the first block are not masked
    torch.manual_seed(100 * step + dist.get_rank())
    return model(return_loss=True, **batch(step, dist.get_rank()))


def zero3_trains_as_plain_pytorch(name: str) -> None:
    deepspeed.init_distributed(verbose=False)
    model = MODELS[name]()
    device = torch.device("cpu")
    plain = build_for_training(model, ds_config(1, bf16=False), device, seed=0)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), **ADAMW)
    ds = ds_config(3, world_size=2, bf16=False)
    sharded = build_for_training(model, ds, device, seed=0)
    apply_precision(sharded, torch.float32)
    engine, *_ = deepspeed.initialize(
        model=sharded,
        optimizer=torch.optim.AdamW(sharded.parameters(), **ADAMW),
        config={**ds.raw, "gradient_clipping": 0.0},
    )
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # before any training forward: nothing has been learnt of who reads what
        engine.module.eval()
        torch.testing.assert_close(
            engine.module.encode_decode(image, [{}]),
            plain.eval().encode_decode(image, [{}]),
            rtol=1e-4,
            atol=1e-5,
        )
    engine.module.train(), plain.train()
    for step in range(STEPS):
        expected = losses_of(plain, step)
        plain_optimizer.zero_grad()
        sum(value for key, value in expected.items() if "loss" in key).backward()
        for param in plain.parameters():
            dist.all_reduce(param.grad)
            param.grad /= 2
        plain_optimizer.step()
        found = losses_of(engine, step)
        for name, loss in expected.items():
            torch.testing.assert_close(
                found[name],
                loss,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda said, name=name, step=step: f"{name} of step {step}: {said}",
            )
        engine.backward(sum(value for key, value in found.items() if "loss" in key))
        engine.step()
    changed = dict(plain.named_parameters())
    for name, param in engine.module.named_parameters():
        with gathered([param]):
            torch.testing.assert_close(
                param.data,
                changed[name].data,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda said, name=name: f"{name}: {said}",
            )


@pytest.mark.parametrize("name", MODELS)
def test_zero3_on_2_ranks_trains_and_segments_as_plain_pytorch_in_fp32(name):
    spawn(zero3_trains_as_plain_pytorch, 2, name)
