"""The second family under the same engine: InternImage trains like plain PyTorch, goes on elsewhere, and comes out as a file of the published layout."""

import pytest
import torch
from mmseg.models import build_backbone

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.engine.experiment import read_experiment
from internseg_ds.engine.exporting import export_backbone
from internseg_ds.errors import CheckpointError
from tests.conftest import IMAGE
from tests.end_to_end.conftest import LONG
from tests.end_to_end.test_training import plain_losses

SHORT = [*LONG, "runner.max_iters=6", "checkpoint_config.interval=3", "evaluation.interval=6", "lr_config.warmup_iters=2"]
T = ["model.backbone.res_post_norm=False", "model.backbone.center_feature_scale=False", "model.backbone.layer_scale=1.0", "model.backbone.dw_kernel_size=None",
     "model.backbone.level2_post_norm=False"]
"""What InternImage-T has in place of InternImage-H's parts."""


@pytest.fixture(scope="module", params=["H", "T"])
def trained(request, train, fp32):
    """6 steps under ZeRO-3 in fp32 on 2 processes, saved at step 3 and 6."""
    options = [*SHORT, *(T if request.param == "T" else [])]
    return train("--deepspeed_config", fp32, "--no-validate", config=IMAGE, options=options), options


def test_fp32_zero3_on_2_ranks_follows_plain_pytorch_within_1e_4(trained, ade20k):
    run, options = trained
    assert run.losses == pytest.approx(plain_losses(ade20k, 6, *options, config=IMAGE), abs=1e-4)
    assert run.losses[6] < run.losses[1]


def test_it_goes_on_in_one_process_under_zero2_and_is_scored(trained, train):
    run, options = trained
    resumed = train("--resume", run.work_dir / "checkpoints" / "iter_3", "--deepspeed_config", "ds_configs/zero2_bf16.json", config=IMAGE, processes=1,
                    options=[*options, "data.samples_per_gpu=4", "engine.backbone_dtype=float32"])
    assert resumed.losses == pytest.approx({step: loss for step, loss in run.losses.items() if step > 3}, rel=1e-2)
    assert list(resumed.scores) == [6]


def test_its_backbone_comes_out_as_a_file_of_the_published_layout(trained, tmp_path):
    run, _ = trained
    out = export_backbone(run.work_dir, tmp_path / "backbone.pth", "internimage")
    backbone = build_backbone(read_experiment(run.work_dir / "config.py").model.backbone)
    backbone.load_state_dict(torch.load(out, weights_only=True))
    whole = open_weights(run.work_dir)
    assert all(torch.equal(value, whole.read(f"backbone.{name}")) for name, value in backbone.state_dict().items())
    with pytest.raises(CheckpointError, match="InternImage has no layout 'transformers'; write --backbone internimage"):
        export_backbone(run.work_dir, tmp_path / "folder", "transformers")
