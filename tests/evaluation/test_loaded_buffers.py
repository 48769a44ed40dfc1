"""What weight files do not hold is in a loaded model as its constructor made it: tables of rotary positions."""

import pytest
import torch
from mmseg.models import build_segmentor

from internseg_ds.config.experiment import read_experiment
from internseg_ds.evaluation.inference import load_trained
from tests.conftest import IMAGE, ROOT, TIMM, TINY, TRANSFORMERS

EOMT = "configs/timm_tiny/eomt_dinov3_tiny_112_ade20k.py"


@pytest.mark.parametrize("config", [TINY, IMAGE, TIMM, TRANSFORMERS, EOMT])
def test_every_buffer_and_every_logit_of_a_loaded_model_is_the_saved_ones(config, tmp_path):
    experiment = read_experiment(ROOT / config, {"engine.backbone_dtype": "float32"})
    model = build_segmentor(experiment.model).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    loaded = load_trained(experiment, tmp_path / "weights.pth", torch.device("cpu"))
    expected = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        torch.testing.assert_close(
            buffer.float(), expected[name].float(), msg=lambda m, name=name: f"{name}: {m}"
        )
    image, meta = torch.randn(1, 3, 112, 112), dict(img_shape=(112, 112, 3), ori_shape=(112, 112, 3))
    with torch.no_grad():
        ours, theirs = (each.encode_decode(image, [meta]) for each in (loaded, model))
    assert torch.isfinite(theirs).all() and float(theirs.std()) > 1e-3
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-4)
