"""What only a GPU can show: native bf16, nccl, its own kernels, peak memory. One GPU is enough; without any,
what needs one is skipped, and the tests of trainings run on the CPU alone, so that they are known to work.

Losses are held against the same steps on the CPU in fp32, from the same weights and images and without noise.
How far they may lie apart follows from the same steps on the CPU in bf16: a GPU rounds as often, in another
order.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.batch_norms import AnyDeviceSyncBatchNorm, _NormaliseOverRanks
from internseg_ds.distributed.construction import build_for_training
from internseg_ds.models.intern_image.dcnv3_operator import dcnv3, implementation
from internseg_ds.models.intern_vit.attention import attention
from internseg_ds.models.norms import RMSNorm
from internseg_ds.models.sampling import deformable_attention_operator
from internseg_ds.models.sampling.deformable_attention import attend
from tests.conftest import GPU, IMAGE, MASK2FORMER, ROOT, TINY, data_options
from tests.end_to_end.conftest import NO_NOISE, SMALL, SMALLER, Run

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=needs_gpu)]
FAMILIES = [(config, device) for config in (TINY, IMAGE, MASK2FORMER) for device in ("cpu", "cuda")]
STEPS = 6
ONE = ["data.samples_per_gpu=4", f"runner.max_iters={STEPS}", f"evaluation.interval={STEPS}", *NO_NOISE]
SPREAD = 4
"""How many times as far as the CPU in bf16 a GPU may lie from fp32, at most: its errors and the CPU's are of
one size, and independent."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """weights(config): initial weights of its small model, drawn once on the CPU: a GPU draws others."""

    @functools.cache
    def written(config: str) -> Path:
        from mmcv import DictAction

        options = {
            key: DictAction._parse_iterable(value)
            for key, value in (option.split("=", 1) for option in SMALLER[config])
        }
        experiment = read_experiment(ROOT / config, options)
        ds = resolve_ds_config({}, experiment="", micro_batch=4, world_size=1, optimizer=experiment.optimizer)
        path = tmp_path_factory.mktemp("weights") / "initial.pth"
        torch.save(
            {
                "state_dict": build_for_training(
                    experiment.model, ds, torch.device("cpu"), seed=0
                ).state_dict()
            },
            path,
        )
        return path

    return written


@pytest.fixture(scope="module")
def run(train, weights, fp32) -> Callable[..., Run]:
    """run(config, device, dtype, *options): STEPS steps in one process, saved in the middle and at the end,
    scored at the end; each made once."""

    @functools.cache
    def made(config: str, device: str, dtype: str = "bfloat16", *options: str) -> Run:
        ds_config = "ds_configs/zero3_bf16.json" if dtype == "bfloat16" else fp32
        own = [option for option in ONE if config != MASK2FORMER or "dropout_ratio" not in option]
        settings = {"launcher": "deepspeed", "env": GPU} if device == "cuda" else {}
        return train(
            "--deepspeed_config",
            ds_config,
            "--load-from",
            weights(config),
            config=config,
            processes=1,
            options=[
                *own,
                f"engine.backbone_dtype={dtype}",
                f"checkpoint_config.interval={STEPS // 2}",
                *options,
            ],
            **settings,
        )

    return made


def tolerance(run: Callable[..., Run], config: str) -> float:
    """How far a loss may lie from that of fp32: SPREAD times the furthest of the CPU in bf16, and a rounding
    of bf16 at least."""
    exact, rounded = run(config, "cpu", "float32").losses, run(config, "cpu").losses
    return SPREAD * max(
        max(abs(rounded[step] - exact[step]) for step in exact),
        torch.finfo(torch.bfloat16).eps * max(exact.values()),
    )


@pytest.mark.parametrize(
    ("config", "device"),
    [
        pytest.param(config, device, marks=[needs_gpu] if device == "cuda" else [pytest.mark.slow])
        for config, device in FAMILIES
    ],
)
def test_training_in_bf16_follows_fp32_on_the_cpu(config, device, run):
    # on the CPU another ZeRO stage and hooks on layers stand for another device: the same steps by another
    # way
    other = () if device == "cuda" else ("engine.recomputation=blocks",)
    found, exact = run(config, device, "bfloat16", *other), run(config, "cpu", "float32")
    assert "backbone computes in bfloat16" in found.output and (
        device == "cpu" or "on the GPU in TF32" in found.output
    )
    assert (
        found.losses == pytest.approx(exact.losses, abs=tolerance(run, config))
        and len(set(found.losses.values())) == STEPS
    )
    # the tolerance is small beside what is learnt
    assert min(exact.losses.values()) < exact.losses[1] - tolerance(run, config)
    assert all(record["peak_gib"] > 0 for record in found.records if "loss" in record)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_goes_on_from_what_the_cpu_saved(device, run, train):
    before, step = run(TINY, "cpu"), STEPS // 2
    settings = {"launcher": "deepspeed", "env": GPU} if device == "cuda" else {}
    resumed = train(
        "--deepspeed_config",
        "ds_configs/zero3_bf16.json",
        "--resume",
        before.work_dir / "checkpoints" / f"iter_{step}",
        "--no-save",
        processes=1,
        options=[*ONE, "engine.backbone_dtype=bfloat16"],
        **settings,
    )
    assert sorted(resumed.losses) == list(range(step + 1, STEPS + 1))
    assert resumed.losses == pytest.approx(
        {at: loss for at, loss in before.losses.items() if at > step}, abs=tolerance(run, TINY)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_scores_the_same_on_both(device, run, launch, ade20k, tmp_path):
    trained = run(TINY, device)
    out = tmp_path / "out"
    launch(
        "launch/test.py",
        TINY,
        trained.work_dir / "checkpoints",
        "--out",
        out,
        "--cfg-options",
        *SMALL,
        *ONE,
        *data_options(ade20k),
        processes=1,
    )
    score = json.loads((out / "results.json").read_text())["mIoU"]  # on the CPU
    assert score == pytest.approx(trained.scores[STEPS], abs=0.5)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with one GPU")
def test_two_processes_on_one_gpu_are_refused(train):
    done = train(
        "--deepspeed_config",
        "ds_configs/zero3_bf16.json",
        processes=2,
        launcher="torchrun",
        env=GPU,
        check=False,
    )
    assert "at most 1 process per host" in done.output and done.returncode


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_the_formulas_in_fp64(dtype):
    torch.manual_seed(0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-3
    x, norm = torch.randn(3, 17, 3200), RMSNorm(3200)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(
        norm.cuda().to(dtype)(x.cuda().to(dtype)).cpu().double(), expected, rtol=tolerance, atol=tolerance
    )
    q, k, v = torch.randn(3, 2, 257, 5, 128)
    weights = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) / 128**0.5).softmax(-1)
    expected = (weights @ v.double().transpose(1, 2)).transpose(1, 2)
    found = attention(*(part.cuda().to(dtype) for part in (q, k, v)))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@needs_gpu
def test_batch_norm_is_the_same_on_gpu_and_cpu():
    """By torch's kernel, which one GPU alone uses, and by ours, which takes the moments of all ranks."""
    torch.manual_seed(0)
    x, norm = torch.randn(4, 6, 5, 7), AnyDeviceSyncBatchNorm(6)
    expected = norm(x)
    other = AnyDeviceSyncBatchNorm(6).cuda()
    torch.testing.assert_close(other(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.running_var.cpu(), norm.running_var, rtol=1e-4, atol=1e-4)
    on_gpu, on_cpu = (
        [tensor.to(device).requires_grad_() for tensor in (x, torch.rand(6), torch.rand(6))]
        for device in ("cuda", "cpu")
    )
    on_cpu[1:] = [value.detach().cpu().requires_grad_() for value in on_gpu[1:]]
    found, wanted = (
        gradients(lambda *leaves: _NormaliseOverRanks.apply(*leaves, 1e-5)[0], leaves)
        for leaves in (on_gpu, on_cpu)
    )
    for value, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


def gradients(run, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result of run(*leaves) and the gradients of the leaves, on the CPU."""
    out = run(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [value.detach().cpu() for value in (out, *torch.autograd.grad(out, leaves, grad))]


@needs_gpu
@pytest.mark.parametrize(("size", "channels", "group"), [(56, 64, 4), (28, 640, 20)], ids=["T", "H"])
def test_dcnv3_of_triton_agrees_with_pytorch_at_the_sizes_of_stages(size, channels, group):
    torch.manual_seed(0)
    # exact in fp32, never at a pixel's middle, where gradients jump
    offset = torch.randint(-256, 256, (2, size, size, 18 * group)) / 64 + 1 / 128
    tensors = torch.randn(2, size, size, channels), offset, torch.rand(2, size, size, 9 * group)
    arguments = (3, 3), (1, 1), (1, 1), (1, 1), group, 1.0, False
    on_gpu, on_cpu = (
        [tensor.to(device).requires_grad_() for tensor in tensors] for device in ("cuda", "cpu")
    )
    assert implementation(*on_gpu).__name__.endswith("dcnv3_triton")
    found, wanted = (
        gradients(lambda *leaves: dcnv3(*leaves, *arguments), leaves) for leaves in (on_gpu, on_cpu)
    )
    for value, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_deformable_attention_of_triton_agrees_with_pytorch_at_the_size_of_mask2former_h():
    torch.manual_seed(0)
    shapes = [(28, 28), (56, 56), (112, 112)]
    tokens = sum(height * width for height, width in shapes)
    places = 1, tokens, 32, len(shapes), 4
    tensors = torch.randn(1, tokens, 32, 32), torch.rand(*places, 2) * 1.2 - 0.1, torch.rand(places)
    on_gpu, on_cpu = (
        [tensor.to(device).requires_grad_() for tensor in tensors] for device in ("cuda", "cpu")
    )
    assert deformable_attention_operator.implementation(*on_gpu).__name__.endswith(
        "deformable_attention_triton"
    )
    found, wanted = (
        gradients(lambda value, *where: attend(value, shapes, *where), leaves) for leaves in (on_gpu, on_cpu)
    )
    near = (
        (tensors[1] * torch.tensor([[width, height] for height, width in shapes])[:, None] - 0.5).frac().abs()
    )
    # at a pixel's middle the gradient of a location jumps
    smooth = (torch.minimum(near, 1 - near) > 1e-3).all(-1, keepdim=True)
    for value, expected in zip(found, wanted, strict=True):
        kept = smooth if value.shape == tensors[1].shape else torch.ones(())
        torch.testing.assert_close(value * kept, expected * kept, rtol=1e-3, atol=1e-3)
