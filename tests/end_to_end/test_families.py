"""InternImage, and models of timm and of transformers, under the engine: they train like plain PyTorch under every
stage, go on elsewhere, and come out as files that their own code reads."""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from mmseg.models import build_backbone
from torch import nn

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import export_backbone
from tests.conftest import IMAGE, TIMM, TRANSFORMERS
from tests.end_to_end.conftest import LONG
from tests.end_to_end.test_training import plain_losses

OPTIONS = [
    *LONG,
    "runner.max_iters=6",
    "checkpoint_config.interval=3",
    "evaluation.interval=6",
    "lr_config.warmup_iters=2",
]
CONFIGS = {"intern_image": IMAGE, "timm": TIMM, "transformers": TRANSFORMERS}
# with a layer scale, which blocks own themselves, as T to XL have it, beside the parts of H and G
OF_INTERN_IMAGE = [
    "optimizer_config.grad_clip=None",
    "optimizer.paramwise_cfg.layer_decay_rate=0.9",
    "model.backbone.res_post_norm=False",
    "model.backbone.post_norm=True",
    "model.backbone.layer_scale=1.0",
]


def options_of(family: str) -> list[str]:
    return [*OPTIONS, *(OF_INTERN_IMAGE if family == "intern_image" else [])]


# transformers' is timm's model again, in another library's classes
@pytest.fixture(
    scope="module", params=["intern_image", "timm", pytest.param("transformers", marks=pytest.mark.slow)]
)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(train, fp32, family):
    """6 steps under ZeRO-3 in fp32 on 2 processes, saved at step 3 and 6."""
    options = options_of(family)
    return train("--deepspeed_config", fp32, "--no-validate", config=CONFIGS[family], options=options)


def test_fp32_zero3_on_2_ranks_follows_plain_pytorch_within_1e_4(trained, family, ade20k):
    expected = plain_losses(ade20k, 6, *options_of(family), config=CONFIGS[family])
    assert trained.losses == pytest.approx(expected, abs=1e-4)
    assert len(set(trained.losses.values())) == 6


def test_it_goes_on_in_one_process_under_zero2_and_is_scored(trained, train, family):
    resumed = train(
        "--resume",
        trained.work_dir / "checkpoints" / "iter_3",
        "--deepspeed_config",
        "ds_configs/zero2_bf16.json",
        config=CONFIGS[family],
        processes=1,
        options=[*options_of(family), "data.samples_per_gpu=4", "engine.backbone_dtype=float32"],
    )
    assert resumed.losses == pytest.approx(
        {step: loss for step, loss in trained.losses.items() if step > 3}, rel=1e-2
    )
    assert list(resumed.scores) == [6]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_every_stage_has_the_same_losses_in_bf16(stage, trained, train, family):
    options = [*options_of(family), "checkpoint_config.interval=0", "engine.backbone_dtype=bfloat16"]
    run = train(
        "--deepspeed_config",
        f"ds_configs/{stage}.json",
        "--no-validate",
        config=CONFIGS[family],
        options=options,
    )
    assert run.losses == pytest.approx(trained.losses, rel=2e-2)


def read_by_mmseg(folder: Path, work_dir: Path) -> tuple[nn.Module, set[str]]:
    out = export_backbone(work_dir, folder / "backbone.pth", "internimage")
    model = build_backbone(read_experiment(work_dir / "config.py").model.backbone)
    model.load_state_dict(torch.load(out, weights_only=True))
    return model, set()


def read_by_timm(folder: Path, work_dir: Path) -> tuple[nn.Module, set[str]]:
    out = export_backbone(work_dir, folder / "backbone.pth", "timm")
    model = timm.create_model("vit_small_patch16_dinov3", embed_dim=64, depth=4, num_heads=4, num_classes=0)
    missing, unexpected = model.load_state_dict(torch.load(out, weights_only=True), strict=False)
    assert set(missing) == {"norm.weight", "norm.bias"} and not unexpected
    return model, set(missing)


def read_by_transformers(folder: Path, work_dir: Path) -> tuple[nn.Module, set[str]]:
    out = export_backbone(work_dir, folder / "backbone", "transformers")
    model, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model) is transformers.DINOv3ViTModel
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model, set()


def test_its_backbone_comes_out_as_a_file_that_its_own_code_reads(trained, family, tmp_path):
    readers = {"intern_image": read_by_mmseg, "timm": read_by_timm, "transformers": read_by_transformers}
    model, missing = readers[family](tmp_path, trained.work_dir)
    whole, prefix = open_weights(trained.work_dir), "" if family == "intern_image" else "model."
    assert all(
        torch.equal(value, whole.read(f"backbone.{prefix}{name}"))
        for name, value in model.state_dict().items()
        if name not in missing
    )
    other = "transformers" if family == "intern_image" else "internimage"
    with pytest.raises(CheckpointError, match=f"no layout '{other}'"):
        export_backbone(trained.work_dir, tmp_path / "other", other)


@pytest.mark.slow
def test_a_dinov3_without_register_tokens_trains_like_plain_pytorch(train, fp32, ade20k):
    options = [*OPTIONS, "runner.max_iters=2", "checkpoint_config.interval=2"]
    options.append("model.backbone.config.num_register_tokens=0")  # a parameter without elements
    run = train("--deepspeed_config", fp32, "--no-validate", config=TRANSFORMERS, options=options)
    assert run.losses == pytest.approx(plain_losses(ade20k, 2, *options, config=TRANSFORMERS), abs=1e-4)
