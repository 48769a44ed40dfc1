"""A fine-tuned backbone goes back to where its weights came from: transformers computes the same features
with it, and it starts another run."""

import pytest
import torch

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import export_backbone
from internseg_ds.evaluation.inference import load_trained


@pytest.fixture(scope="module")
def segmentor(trained):
    """The trained segmentor in fp32, its backbone without FPN."""
    experiment = read_experiment(trained.work_dir / "config.py", {"engine.backbone_dtype": "float32"})
    model = load_trained(experiment, trained.work_dir, torch.device("cpu"))
    model.backbone.with_fpn = False
    return model


def test_transformers_computes_the_same_features(trained, segmentor, tmp_path):
    from transformers import InternVLVisionModel

    folder = export_backbone(trained.work_dir, tmp_path / "vit", "transformers")
    theirs = InternVLVisionModel.from_pretrained(folder, output_loading_info=True)
    model, info = theirs
    assert not any(info.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        hidden = model.eval()(image, output_hidden_states=True).hidden_states
        for index, features in zip(segmentor.backbone.out_indices, segmentor.backbone(image)):
            torch.testing.assert_close(
                features, hidden[index + 1][:, 1:].mT.reshape(1, 32, 8, 8), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(
    ("layout", "name"), [("internvl", "vit.pth"), ("opengvlab", "folder"), ("transformers", "folder")]
)
def test_an_exported_backbone_starts_another_run(layout, name, trained, train, segmentor, tmp_path):
    out = export_backbone(trained.work_dir, tmp_path / name, layout, dtype="bfloat16")
    run = train(
        "--no-validate",
        options=[
            "runner.max_iters=1",
            "checkpoint_config.interval=1",
            f"model.backbone.pretrained={out}",
            "lr_config.warmup_ratio=1e-9",
        ],
        processes=1,
    )
    weights = open_weights(run.work_dir)
    for key, value in segmentor.backbone.state_dict().items():
        if not key.startswith("up"):
            torch.testing.assert_close(
                weights.read(f"backbone.{key}"), value.bfloat16().float(), rtol=1e-3, atol=1e-5
            )


def test_a_layout_and_a_name_that_do_not_go_together_are_refused(trained, tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        export_backbone(trained.work_dir, tmp_path / "vit.pth", "transformers")
    with pytest.raises(CheckpointError, match=r"is one \.pth"):
        export_backbone(trained.work_dir, tmp_path / "vit", "internvl")
