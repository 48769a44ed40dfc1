"""Models of timm and of transformers under the engine: they train like plain PyTorch under every stage, go on
elsewhere, and come out as files that their library reads."""

from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.evaluation.export import export_backbone
from tests.conftest import TIMM, TRANSFORMERS
from tests.end_to_end.conftest import LONG
from tests.end_to_end.test_training import plain_losses

OPTIONS = [
    *LONG,
    "runner.max_iters=6",
    "checkpoint_config.interval=3",
    "evaluation.interval=6",
    "lr_config.warmup_iters=2",
]
LIBRARIES = {"timm": TIMM, "transformers": TRANSFORMERS}


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(train, fp32, library):
    """6 steps under ZeRO-3 in fp32 on 2 processes, saved at step 3 and 6."""
    return train("--deepspeed_config", fp32, "--no-validate", config=LIBRARIES[library], options=OPTIONS)


def test_fp32_zero3_on_2_ranks_follows_plain_pytorch_within_1e_4(trained, library, ade20k):
    expected = plain_losses(ade20k, 6, *OPTIONS, config=LIBRARIES[library])
    assert trained.losses == pytest.approx(expected, abs=1e-4)
    assert len(set(trained.losses.values())) == 6


def goes_on_in_one_process_under_zero2_and_is_scored(trained, train, config: str) -> None:
    resumed = train(
        "--resume",
        trained.work_dir / "checkpoints" / "iter_3",
        "--deepspeed_config",
        "ds_configs/zero2_bf16.json",
        config=config,
        processes=1,
        options=[*OPTIONS, "data.samples_per_gpu=4", "engine.backbone_dtype=float32"],
    )
    assert resumed.losses == pytest.approx(
        {step: loss for step, loss in trained.losses.items() if step > 3}, rel=1e-2
    )
    assert list(resumed.scores) == [6]


@pytest.mark.parametrize("library", ["timm"], indirect=True)
def test_timms_goes_on_elsewhere(trained, train, library):
    goes_on_in_one_process_under_zero2_and_is_scored(trained, train, LIBRARIES[library])


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers"], indirect=True)
def test_transformers_goes_on_elsewhere(trained, train, library):
    goes_on_in_one_process_under_zero2_and_is_scored(trained, train, LIBRARIES[library])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1_bf16", "zero2_bf16", "zero3_bf16"])
def test_every_stage_has_the_same_losses_in_bf16(stage, trained, train, library):
    options = [*OPTIONS, "checkpoint_config.interval=0", "engine.backbone_dtype=bfloat16"]
    run = train(
        "--deepspeed_config",
        f"ds_configs/{stage}.json",
        "--no-validate",
        config=LIBRARIES[library],
        options=options,
    )
    assert run.losses == pytest.approx(trained.losses, rel=2e-2)


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


def test_its_backbone_comes_out_as_a_file_that_its_library_reads(trained, library, tmp_path):
    read = {"timm": read_by_timm, "transformers": read_by_transformers}[library]
    model, missing = read(tmp_path, trained.work_dir)
    whole = open_weights(trained.work_dir)
    assert all(
        torch.equal(value, whole.read(f"backbone.model.{name}"))
        for name, value in model.state_dict().items()
        if name not in missing
    )
