"""What only a GPU can show: native bf16, nccl, torch's own SyncBatchNorm, peak memory. One GPU is enough; without any, all of this is skipped."""

import json
import math

import pytest
import torch

from internseg_ds.distributed.sync_batch_norm import AnyDeviceSyncBatchNorm
from internseg_ds.models import deformable_attention_operator
from internseg_ds.models.attention import attention
from internseg_ds.models.dcnv3_operator import dcnv3, implementation
from internseg_ds.models.deformable_attention import attend
from internseg_ds.models.norms import RMSNorm
from tests.conftest import GPU, IMAGE, MASK2FORMER, TINY, data_options
from tests.end_to_end.conftest import LONG, SMALL
from tests.end_to_end.test_training import plain_losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ONE = ["data.samples_per_gpu=4"]


@pytest.fixture(scope="module")
def run(train):
    """6 steps in one process on the GPU, saved and evaluated at the end."""
    options = [*LONG, *ONE, "runner.max_iters=6", "checkpoint_config.interval=6", "evaluation.interval=6"]
    return train("--deepspeed_config", "ds_configs/zero3_bf16.json", options=options, processes=1, launcher="deepspeed", env=GPU)


def test_training_in_bf16_follows_plain_pytorch_on_the_cpu(run, ade20k):
    assert "backbone computes in bfloat16" in run.output
    assert run.losses == pytest.approx(plain_losses(ade20k, 6, "runner.max_iters=6"), rel=2e-2)
    assert all(record["peak_gib"] > 0 for record in run.records if "loss" in record)


def test_the_checkpoint_scores_the_same_on_gpu_and_cpu(run, launch, ade20k, tmp_path):
    scores = []
    for name, env in (("gpu", GPU), ("cpu", {})):
        out = tmp_path / name
        launch("launch/test.py", TINY, run.work_dir / "checkpoints", "--out", out, "--cfg-options", *SMALL, *ONE, *data_options(ade20k), processes=1,
               launcher="deepspeed", env=env)
        scores.append(json.loads((out / "results.json").read_text())["mIoU"])
    assert scores == pytest.approx([run.scores[6]] * 2, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_formulas_in_fp64(dtype):
    torch.manual_seed(0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    x, norm = torch.randn(3, 17, 3200), RMSNorm(3200)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm.cuda().to(dtype)(x.cuda().to(dtype)).cpu().double(), expected, rtol=tolerance, atol=tolerance)
    q, k, v = torch.randn(3, 2, 257, 5, 128)
    weights = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 128**0.5).softmax(-1)
    expected = (weights @ v.double().transpose(1, 2)).transpose(1, 2)
    found = attention(*(part.cuda().to(dtype) for part in (q, k, v)))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_batch_norm_is_the_same_on_gpu_and_cpu():
    torch.manual_seed(0)
    x, norm = torch.randn(4, 6, 5, 7), AnyDeviceSyncBatchNorm(6)
    expected = norm(x)
    other = AnyDeviceSyncBatchNorm(6).cuda()
    torch.testing.assert_close(other(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.running_var.cpu(), norm.running_var, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [IMAGE, MASK2FORMER])
def test_the_other_family_and_the_other_head_train_in_bf16(config, train):
    done = train("--deepspeed_config", "ds_configs/zero3_bf16.json", "--no-validate", config=config, processes=1, launcher="deepspeed", env=GPU,
                 options=[*ONE, "runner.max_iters=3", "checkpoint_config.interval=3"])
    assert "backbone computes in bfloat16" in done.output
    assert sorted(done.losses) == [1, 2, 3] and all(math.isfinite(loss) for loss in done.losses.values()) and len(set(done.losses.values())) == 3


def gradients(run, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result of run(*leaves) and the gradients of the leaves, on the CPU."""
    out = run(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [value.detach().cpu() for value in (out, *torch.autograd.grad(out, leaves, grad))]


@pytest.mark.parametrize(("size", "channels", "group"), [(56, 64, 4), (28, 640, 20)], ids=["T", "H"])
def test_dcnv3_of_triton_agrees_with_pytorch_at_the_sizes_of_stages(size, channels, group):
    torch.manual_seed(0)
    offset = torch.randint(-256, 256, (2, size, size, 18 * group)) / 64 + 1 / 128  # exact in fp32, never at a pixel's middle, where gradients jump
    tensors = torch.randn(2, size, size, channels), offset, torch.rand(2, size, size, 9 * group)
    arguments = (3, 3), (1, 1), (1, 1), (1, 1), group, 1.0, False
    on_gpu, on_cpu = ([tensor.to(device).requires_grad_() for tensor in tensors] for device in ("cuda", "cpu"))
    assert implementation(*on_gpu).__name__.endswith("dcnv3_triton")
    found, wanted = (gradients(lambda *leaves: dcnv3(*leaves, *arguments), leaves) for leaves in (on_gpu, on_cpu))
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def test_deformable_attention_of_triton_agrees_with_pytorch_at_the_size_of_mask2former_h():
    torch.manual_seed(0)
    shapes = [(28, 28), (56, 56), (112, 112)]
    tokens = sum(height * width for height, width in shapes)
    places = 1, tokens, 32, len(shapes), 4
    tensors = torch.randn(1, tokens, 32, 32), torch.rand(*places, 2) * 1.2 - 0.1, torch.rand(places)
    on_gpu, on_cpu = ([tensor.to(device).requires_grad_() for tensor in tensors] for device in ("cuda", "cpu"))
    assert deformable_attention_operator.implementation(*on_gpu).__name__.endswith("deformable_attention_triton")
    found, wanted = (gradients(lambda value, *where: attend(value, shapes, *where), leaves) for leaves in (on_gpu, on_cpu))
    near = (tensors[1] * torch.tensor([[width, height] for height, width in shapes])[:, None] - 0.5).frac().abs()
    smooth = (torch.minimum(near, 1 - near) > 1e-3).all(-1, keepdim=True)  # at a pixel's middle the gradient of a location jumps
    for value, expected in zip(found, wanted, strict=True):
        kept = smooth if value.shape == tensors[1].shape else torch.ones(())
        torch.testing.assert_close(value * kept, expected * kept, rtol=1e-3, atol=1e-3)
