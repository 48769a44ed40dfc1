"""Folders for transformers: what its classes, and the code that a folder brings, compute without this package is what
the segmentor computes, and a folder read again is the segmentor."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv import Config, ConfigDict
from mmcv.cnn.utils import revert_sync_batchnorm
from mmseg.models import build_segmentor
from torch import nn

import internseg_ds.models  # noqa: F401 - registers ours
from internseg_ds.checkpoints.consolidate import write_sharded
from internseg_ds.checkpoints.stored_tensors import HeldTensor
from internseg_ds.checkpoints.streaming import Entry
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import renamed_entries
from internseg_ds.evaluation.huggingface import from_folder, usage_of
from internseg_ds.evaluation.preprocessor import preprocessor_config
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.models.huggingface.formats import segmentor_format
from tests.conftest import ROOT, TINY
from tests.models.eomt import small_eomt

IMAGE = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
SIDE = 128


def upernet(channels: list[int], **backbone) -> ConfigDict:
    model = Config.fromfile(ROOT / TINY).model
    model.backbone = backbone | {"drop_path_rate": 0.0}
    model.decode_head.update(in_channels=channels, channels=16, num_classes=7)
    model.test_cfg.update(crop_size=(112, 112), stride=(70, 70))
    del model["auxiliary_head"]
    return model


def internvit(**changed) -> ConfigDict:
    backbone = Config.fromfile(ROOT / TINY).model.backbone
    return upernet([32] * 4, **{**backbone, "embed_dim": 32, "num_heads": 2, **changed})


def staged(channels: list[int], **config) -> ConfigDict:
    return upernet(channels, type="TransformersBackbone", config=config)


def internvl(**config) -> ConfigDict:
    """InternViT as transformers has it, with a pyramid."""
    fields = dict(hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64)
    neck = dict(type="ViTFeaturePyramid", with_norm=config.pop("with_norm", False))
    return upernet(
        [32] * 4,
        type="TransformersBackbone",
        config=dict(model_type="internvl_vision", image_size=112, patch_size=14, **fields, **config),
        out_indices=[0, 1, 2, 3],
        neck=neck,
    )


def eomt(model: ConfigDict) -> ConfigDict:
    model.test_cfg = ConfigDict(mode="slide", crop_size=(SIDE, SIDE), stride=(SIDE, SIDE))
    return model


MODELS = {
    "internvit": lambda: internvit(),
    "internvit_300m": lambda: internvit(
        norm_type="layer_norm",
        qkv_bias=True,
        qk_normalization=False,
        layerscale_force_fp32=True,
    ),
    "internvit_transformers": lambda: internvl(use_qk_norm=True, norm_type="rms_norm", attention_bias=False),
    "internvit_2_5_300m": lambda: internvl(
        use_qk_norm=False, norm_type="layer_norm", attention_bias=True, with_norm=True
    ),
    "swin": lambda: staged(
        [12, 24, 48, 96], model_type="swin", embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]
    ),
    "convnext": lambda: staged(
        [8, 16, 24, 32], model_type="convnext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
    ),
    "eomt_timm": lambda: eomt(small_eomt.config()),
    "eomt_transformers": lambda: eomt(small_eomt.config_of_transformers()),
}


def drawn(model: ConfigDict) -> nn.Module:
    """With values that are all random, the statistics of batch norms too."""
    torch.manual_seed(0)
    segmentor = revert_sync_batchnorm(build_segmentor(model)).eval()
    for name, value in segmentor.state_dict().items():
        if value.is_floating_point():
            spread = 0.2 if value.dim() < 2 else 2 / value[0].numel() ** 0.5
            centre = 1.0 if "var" in name or ("norm" in name and name.endswith("weight")) else 0.0
            value.normal_(centre, 0.1 if centre else spread)
    return segmentor


def write_folder(segmentor: nn.Module, folder: Path) -> Path:
    """As `export_huggingface` does, of a model without a checkpoint."""
    found = segmentor_format(segmentor)
    entries = {
        name: Entry(value.shape, value.dtype, HeldTensor(value).read_slice)
        for name, value in segmentor.state_dict().items()
    }
    constants = {
        name: Entry(value.shape, value.dtype, HeldTensor(value).read_slice)
        for name, value in found.constants.items()
    }
    written = renamed_entries(found.sources, entries, prefix="") | constants
    write_sharded(folder, written, {"format": "pt"}, lambda _: None)
    (folder / "config.json").write_text(json.dumps(found.config | {"dtype": "float32"}))
    for code in found.code:
        (folder / code.name).write_text(code.read_text())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[nn.Module, Path, dict[str, torch.Tensor]]]:
    """Of each model: itself, its folder, and what transformers computes with that."""
    place = tmp_path_factory.mktemp("folders")
    models = {name: drawn(make()) for name, make in MODELS.items()}
    written = {name: write_folder(model, place / name) for name, model in models.items()}
    torch.save(IMAGE, place / "image.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("load_folders.py"), place / "image.pt", *written.values()],
        cwd=place,
        env=env | {"HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (model, written[name], torch.load(written[name] / "outputs.pt"))
        for name, model in models.items()
    }


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("eomt")])
def test_logits_are_those_of_the_segmentor(name, folders):
    segmentor, folder, theirs = folders[name]
    assert [file.name for file in folder.glob("*.py")] == (
        ["modeling_internvit_upernet.py"] if name.startswith("internvit") else []
    )
    pixels = IMAGE
    if name.startswith("internvit"):  # padded to patches of 14, as an evaluation does
        pixels = nn.functional.pad(IMAGE, (0, 12, 0, 12))
    with torch.no_grad():
        ours = segmentor.encode_decode(pixels, [{}] * 2)[:, :, :128, :128]
    assert float(ours.std(dim=(2, 3)).max()) > 0.02  # the image shows in them
    torch.testing.assert_close(theirs["logits"], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eomt_timm", "eomt_transformers"])
def test_masks_and_scores_of_queries_give_the_logits_of_the_segmentor(name, folders):
    segmentor, _, theirs = folders[name]
    masks, scores = theirs["masks_queries_logits"], theirs["class_queries_logits"]
    expected = torch.einsum("bqk,bqhw->bkhw", scores.softmax(-1)[..., :-1], masks.sigmoid())
    with torch.no_grad():
        ours = segmentor.encode_decode(IMAGE, [{}] * 2)
    assert float(ours.std()) > 0.01
    torch.testing.assert_close(
        ours, nn.functional.interpolate(expected, (SIDE, SIDE), mode="bilinear"), rtol=1e-4, atol=1e-4
    )


def test_the_code_of_a_folder_slides_over_an_image_as_an_evaluation_does(folders):
    segmentor, _, theirs = folders["internvit"]
    meta = dict(ori_shape=(128, 128, 3), img_shape=(128, 128, 3), flip=False)
    inputs = ((index, dict(img=[image[None]], img_metas=[[meta]])) for index, image in enumerate(IMAGE))
    inference = SlidingWindowInference(Forwards(segmentor), logits=True)
    for index, prediction in enumerate(inference.predict(inputs)):
        torch.testing.assert_close(theirs["windowed"][index], prediction.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs["windowed"], theirs["logits"], atol=1e-3)  # windows make a difference


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_read_again_has_the_weights_of_the_segmentor(name, folders):
    segmentor, folder, _ = folders[name]
    weights = from_folder(open_weights(folder), build_on_meta(MODELS[name]()))
    own = segmentor.state_dict()
    assert weights.shapes == {key: value.shape for key, value in own.items()}
    for key, value in own.items():
        if "mask_token" not in key:
            assert torch.equal(weights.read(key), value), key


def test_a_folder_of_another_model_is_refused(folders):
    with pytest.raises(CheckpointError, match=r"swin lacks backbone\."):
        from_folder(open_weights(folders["swin"][1]), build_on_meta(MODELS["internvit"]()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(decode_head=dict(norm_cfg=dict(type="GN", num_groups=4))), "no batch norms"),
        (dict(decode_head=dict(act_cfg=dict(type="GELU"))), "no ReLU"),
        (dict(decode_head=dict(align_corners=True)), "align_corners"),
        (dict(backbone=dict(neck="SimpleFeaturePyramid")), "has a neck"),
        (dict(decode_head=dict(in_index=[0, 1, 3], in_channels=[12, 24, 96])), "not all maps"),
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(change, reason):
    model = MODELS["swin"]()
    for part, settings in change.items():
        model[part].update(settings)
    if "backbone" in change:
        model.decode_head.in_channels = [256] * 4
    with pytest.raises(ValueError, match=reason):
        segmentor_format(build_on_meta(model))


def test_a_segmentor_that_transformers_does_not_have_is_refused_with_those_that_it_has():
    model = internvit()
    model.decode_head = dict(type="FCNHead", in_channels=32, channels=8, num_classes=7)
    with pytest.raises(
        ValueError, match=r"no class for EncoderDecoder with FCNHead on InternViT6B; .*UPerHead"
    ):
        segmentor_format(build_on_meta(model))


def test_the_code_of_a_model_card_segments_with_what_the_folder_says_of_images(folders, monkeypatch):
    segmentor, folder, _ = folders["eomt_timm"]
    experiment = replace(read_experiment(small_eomt.CONFIG), model=MODELS["eomt_timm"]())
    found = segmentor_format(build_on_meta(experiment.model))
    fields = preprocessor_config(experiment, found.processor, splits=found.splits_images)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(folder.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    cv2.imwrite("image.png", pixels[..., ::-1])
    code = usage_of(found, folder.name, bgr=False).replace("image.jpg", "image.png")
    names: dict = {}
    exec(code.partition("# or,")[0], names)
    mean, std = ([255 * value for value in fields[f"image_{name}"]] for name in ("mean", "std"))
    image = torch.from_numpy((pixels - mean) / std).float().permute(2, 0, 1)
    with torch.no_grad():
        ours = segmentor.encode_decode(image[None], [{}])[0].argmax(0)
    assert len(ours.unique()) > 1
    # their processor enlarges masks before the sigmoid, ours behind it: borders differ
    assert float((names["labels"] == ours).float().mean()) > 0.99
