"""The second family under the same engine: InternImage trains like plain PyTorch, goes on elsewhere, and
comes out as a file of the published layout."""

import pytest
import torch
from mmseg.models import build_backbone

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import export_backbone
from tests.conftest import IMAGE
from tests.end_to_end.conftest import LONG
from tests.end_to_end.test_training import plain_losses

OPTIONS = [
    *LONG,
    "runner.max_iters=6",
    "checkpoint_config.interval=3",
    "evaluation.interval=6",
    "lr_config.warmup_iters=2",
    "optimizer_config.grad_clip=None",
    "optimizer.paramwise_cfg.layer_decay_rate=0.9",
    "model.backbone.res_post_norm=False",
    "model.backbone.post_norm=True",
    "model.backbone.layer_scale=1.0",
]
"""With a layer scale, which blocks own themselves, as T to XL have it, beside the parts of H and G."""


@pytest.fixture(scope="module")
def trained(train, fp32):
    """6 steps under ZeRO-3 in fp32 on 2 processes, saved at step 3 and 6."""
    return train("--deepspeed_config", fp32, "--no-validate", config=IMAGE, options=OPTIONS)


def test_fp32_zero3_on_2_ranks_follows_plain_pytorch_within_1e_4(trained, ade20k):
    assert trained.losses == pytest.approx(plain_losses(ade20k, 6, *OPTIONS, config=IMAGE), abs=1e-4)
    assert len(set(trained.losses.values())) == 6


def test_it_goes_on_in_one_process_under_zero2_and_is_scored(trained, train):
    resumed = train(
        "--resume",
        trained.work_dir / "checkpoints" / "iter_3",
        "--deepspeed_config",
        "ds_configs/zero2_bf16.json",
        config=IMAGE,
        processes=1,
        options=[*OPTIONS, "data.samples_per_gpu=4", "engine.backbone_dtype=float32"],
    )
    assert resumed.losses == pytest.approx(
        {step: loss for step, loss in trained.losses.items() if step > 3}, rel=1e-2
    )
    assert list(resumed.scores) == [6]


def test_its_backbone_comes_out_as_a_file_of_the_published_layout(trained, tmp_path):
    out = export_backbone(trained.work_dir, tmp_path / "backbone.pth", "internimage")
    backbone = build_backbone(read_experiment(trained.work_dir / "config.py").model.backbone)
    backbone.load_state_dict(torch.load(out, weights_only=True))
    whole = open_weights(trained.work_dir)
    assert all(
        torch.equal(value, whole.read(f"backbone.{name}")) for name, value in backbone.state_dict().items()
    )
    with pytest.raises(CheckpointError, match="no layout 'transformers'; write --backbone internimage"):
        export_backbone(trained.work_dir, tmp_path / "folder", "transformers")
