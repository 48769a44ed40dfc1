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
from internseg_ds.data.image_files import ImageFiles
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import renamed_entries
from internseg_ds.evaluation.huggingface import from_folder, usage_of
from internseg_ds.evaluation.preprocessor import preprocessor_config
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.models.huggingface.formats import segmentor_format
from tests.conftest import ROOT, TINY
from tests.data.rasters.test_raster_files import written
from tests.models.eomt import small_eomt
from tests.models.mask2former import small_mask2former

IMAGE = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
OTHER = IMAGE[:1, :, 20:, :80]
"""Of another size."""
SIDE = 128


def upernet(widths: list[int], **backbone) -> ConfigDict:
    model = Config.fromfile(ROOT / TINY).model
    model.backbone = backbone | {"drop_path_rate": 0.0}
    model.decode_head.update(in_channels=widths, channels=16, num_classes=7)
    model.test_cfg.update(crop_size=(112, 112), stride=(70, 70))
    del model["auxiliary_head"]
    return model


def internvit(**changed) -> ConfigDict:
    backbone = Config.fromfile(ROOT / TINY).model.backbone
    return upernet([32] * 4, **{**backbone, "embed_dim": 32, "num_heads": 2, **changed})


def staged(widths: list[int], **config) -> ConfigDict:
    return upernet(widths, type="TransformersBackbone", config=config)


def probe(model: ConfigDict, width: int, **head) -> ConfigDict:
    """With a linear probe, or a head of convolutions, of the last map."""
    model.decode_head = dict(
        type="FCNHead",
        **dict(in_channels=width, channels=width, num_convs=0, concat_input=False, with_norm=True),
        num_classes=7,
        norm_cfg=dict(type="BN"),
    )
    model.decode_head.update(head)
    return model


def timm(widths: list[int], **backbone) -> ConfigDict:
    small = dict(embed_dim=48, depth=4, num_heads=3)
    name = dict(model_name="vit_small_patch16_dinov3", model_args=small)
    return upernet(widths, type="TimmBackbone", **{**name, **backbone})


def internimage(**changed) -> ConfigDict:
    file = ROOT / "configs/intern_image_tiny/upernet_intern_image_tiny_112_ade20k.py"
    backbone = Config.fromfile(file).model.backbone
    sizes = dict(channels=16, depths=[1, 1, 2, 1], groups=[1, 2, 4, 8], init_cfg=None)
    backbone.update(sizes, level2_post_norm_block_ids=[0])
    backbone.update(changed)
    return upernet([16, 32, 64, 128], **backbone)


def dinov3(**config) -> ConfigDict:
    """As transformers has it, with a pyramid of its last map."""
    fields = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96)
    return upernet(
        [16] * 4,
        type="TransformersBackbone",
        config=dict(model_type="dinov3_vit", num_register_tokens=0, **fields),
        neck=dict(type="SimpleFeaturePyramid", out_channels=16),
    )


def mask2former(model: ConfigDict, widths: list[int]) -> ConfigDict:
    """With Mask2Former's head."""
    whole = small_mask2former.config(classes=7)
    head = whole.decode_head
    head.pixel_decoder.norm_cfg = dict(type="GN", num_groups=32)
    head.in_channels = widths
    return ConfigDict(whole, backbone=model.backbone, test_cfg=model.test_cfg)


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


def swin_with_neck() -> ConfigDict:
    model = MODELS["swin"]()
    model.backbone["neck"] = dict(type="SimpleFeaturePyramid", out_channels=16)
    model.decode_head.update(in_channels=[16] * 4, align_corners=True)
    return model


def some_maps(model: ConfigDict) -> ConfigDict:
    model.decode_head.update(in_index=[0, 1, 3], in_channels=[12, 24, 96])
    return model


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
    "internvit_probe": lambda: probe(internvit(with_fpn=False, out_indices=[3]), 32),
    "internimage_h": lambda: internimage(),
    "internimage_t": lambda: internimage(
        **dict(res_post_norm=False, level2_post_norm=False, center_feature_scale=False, dw_kernel_size=None),
        **dict(layer_scale=1.0, norm_layer="BN", post_norm=True, act_layer="SiLU", offset_scale=2.0),
    ),
    "vit_adapter": lambda: internvit(
        type="InternViTAdapter",
        **dict(img_size=64, patch_size=16, with_fpn=False, out_indices=[0, 1, 2, 3], conv_inplane=4),
        **dict(interaction_indexes=[[0, 1], [2, 3]], deform_ratio=0.5, init_values=0.3),
    ),
    "timm_dinov3": lambda: timm([48] * 4, neck="ViTFeaturePyramid"),
    "timm_probe": lambda: probe(timm([48], out_indices=[3], final_norm=True), 48),
    "timm_fcn": lambda: probe(
        timm([48] * 4),
        192,
        **dict(num_convs=2, concat_input=True, channels=16, with_norm=False, dilation=2),
        **dict(input_transform="resize_concat", in_index=[0, 1, 2, 3], in_channels=[48] * 4),
    ),
    "timm_swin": lambda: timm(
        [12, 24, 48, 96],
        model_name="swin_tiny_patch4_window7_224",
        model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    ),
    "dinov3_transformers": lambda: dinov3(),
    "swin": lambda: staged(
        [12, 24, 48, 96], model_type="swin", embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]
    ),
    "convnext": lambda: staged(
        [8, 16, 24, 32], model_type="convnext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]
    ),
    "swin_probe": lambda: probe(MODELS["swin"](), 96, in_index=3, align_corners=True),
    "swin_neck": lambda: swin_with_neck(),
    "swin_maps": lambda: some_maps(MODELS["swin"]()),
    "mask2former_swin": lambda: mask2former(MODELS["swin"](), [12, 24, 48, 96]),
    "mask2former_internimage": lambda: mask2former(internimage(), [16, 32, 64, 128]),
    "mask2former_timm": lambda: mask2former(MODELS["timm_dinov3"](), [48] * 4),
    "mask2former_internvit": lambda: mask2former(internvit(), [32] * 4),
    "mask2former_dinov3": lambda: mask2former(dinov3(), [16] * 4),
    "eomt_timm": lambda: eomt(small_eomt.config()),
    "eomt_transformers": lambda: eomt(small_eomt.config_of_transformers()),
    "eomt_timm_gated": lambda: eomt(
        small_eomt.config(
            model_args=dict(embed_dim=64, depth=4, num_heads=4, swiglu_mlp=True, swiglu_align_to=64)
        )
    ),
    "eomt_transformers_gated": lambda: eomt(
        small_eomt.config_of_transformers(use_gated_mlp=True, hidden_act="silu")
    ),
}

BROUGHT = {
    "internvit": "internvit",
    "internvit_300m": "internvit",
    "internvit_probe": "internvit",
    "internvit_transformers": "plain_transformer",
    "internvit_2_5_300m": "plain_transformer",
    "internimage_h": "internimage",
    "internimage_t": "internimage",
    "vit_adapter": "vit_adapter",
    "timm_dinov3": "timm",
    "timm_probe": "timm",
    "timm_fcn": "timm",
    "timm_swin": "timm",
    "dinov3_transformers": "plain_transformer",
    "swin_probe": "staged_transformer",
    "swin_neck": "staged_transformer",
    "swin_maps": "staged_transformer",
    "mask2former_internimage": "internimage",
    "mask2former_timm": "timm",
    "mask2former_internvit": "internvit",
    "mask2former_dinov3": "plain_transformer",
}
"""Folders with code -> its file with the backbone."""


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


QUICK = (
    "internvit",
    "internvit_probe",
    "internimage_h",
    "timm_dinov3",
    "dinov3_transformers",
    "vit_adapter",
    "swin",
    "swin_neck",
    "mask2former_swin",
    "mask2former_internimage",
    "eomt_timm",
    "eomt_timm_gated",
)
"""Models of the suite; the others prove more of the same."""
Folders = dict[str, tuple[nn.Module, Path, dict[str, list[torch.Tensor]]]]


def loaded(names: list[str], place: Path) -> Folders:
    """Of each model: itself, its folder, and what transformers computes with that."""
    models = {name: drawn(MODELS[name]()) for name in names}
    written = {name: write_folder(model, place / name) for name, model in models.items()}
    torch.save([IMAGE, OTHER], place / "images.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("load_folders.py"), place / "images.pt", *written.values()],
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return loaded(list(QUICK), tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def more_folders(tmp_path_factory) -> Folders:
    return loaded([name for name in MODELS if name not in QUICK], tmp_path_factory.mktemp("more_folders"))


@pytest.fixture
def loaded_folder(name, request):
    """That of the model `name`."""
    return request.getfixturevalue("folders" if name in QUICK else "more_folders")[name]


def models(*heads: str) -> list:
    """The names of models with these heads, "" for those with convolutions."""
    named = {name: name.partition("_")[0] for name in MODELS}
    return [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, first in named.items()
        if (first if first in ("eomt", "mask2former") else "") in heads
    ]


def logits_of(segmentor: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Of an image that is padded to patches, as in an evaluation."""
    size = getattr(segmentor.backbone, "patch_size", 1)
    vertical, horizontal = (size, size) if isinstance(size, int) else size
    height, width = pixels.shape[2:]
    padded = nn.functional.pad(pixels, (0, -width % horizontal, 0, -height % vertical))
    with torch.no_grad():
        return segmentor.encode_decode(padded, [{}])[:, :, :height, :width]


@pytest.mark.parametrize("name", models("", "mask2former"))
def test_logits_are_those_of_the_segmentor(name, loaded_folder):
    segmentor, folder, theirs = loaded_folder
    brought, head = {file.stem for file in folder.glob("*.py")}, name.startswith("mask2former")
    expected = [f"modeling_{BROUGHT[name]}", "segmentation_parts"] if name in BROUGHT else []
    if head and expected:
        expected += [f"modeling_{BROUGHT[name]}_mask2former", "mask2former_parts"]
    if name == "vit_adapter":
        expected.append("modeling_internvit")
    assert brought == set(expected)
    found = theirs["logits"] if not head else theirs.get("of_pixels")
    for index, pixels in enumerate((IMAGE, OTHER)):
        ours = logits_of(segmentor, pixels)
        assert float(ours.std(dim=(2, 3)).max()) > 0.01  # the image shows in them
        logits = found[index] if found else of_queries(theirs, index, pixels.shape[2:])
        torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)


QUERIES = ("masks_queries_logits", "class_queries_logits")


def of_queries(theirs: dict[str, list[torch.Tensor]], index: int, size: torch.Size) -> torch.Tensor:
    """The logits of pixels of an image from the masks and class scores of the queries."""
    masks, scores = (theirs[name][index] for name in QUERIES)
    found = torch.einsum("bqk,bqhw->bkhw", scores.softmax(-1)[..., :-1], masks.sigmoid())
    return nn.functional.interpolate(found, size, mode="bilinear")


@pytest.mark.parametrize("name", models("eomt"))
def test_masks_and_scores_of_queries_give_the_logits_of_the_segmentor(name, loaded_folder):
    segmentor, folder, theirs = loaded_folder
    assert any(folder.glob("*.py")) == name.endswith("gated")
    ours = logits_of(segmentor, IMAGE)
    assert float(ours.std()) > 0.01
    torch.testing.assert_close(ours, of_queries(theirs, 0, IMAGE.shape[2:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["internvit", "mask2former_internimage"])
def test_the_code_of_a_folder_slides_over_an_image_as_an_evaluation_does(name, loaded_folder):
    segmentor, _, theirs = loaded_folder
    (windowed,) = theirs["windowed"]
    meta = dict(ori_shape=(128, 128, 3), img_shape=(128, 128, 3), flip=False)
    inputs = ((index, dict(img=[image[None]], img_metas=[[meta]])) for index, image in enumerate(IMAGE))
    inference = SlidingWindowInference(Forwards(segmentor), logits=True)
    for index, prediction in enumerate(inference.predict(inputs)):
        torch.testing.assert_close(windowed[index], prediction.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(windowed[index].argmax(0), prediction.logits.argmax(0))
    whole = theirs["of_pixels"][0]
    assert not torch.allclose(windowed, whole, atol=1e-3)  # windows make a difference


@pytest.mark.parametrize("name", models("", "mask2former", "eomt"))
def test_a_folder_read_again_has_the_weights_of_the_segmentor(name, loaded_folder):
    segmentor, folder, _ = loaded_folder
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
    ],
)
def test_what_transformers_would_compute_otherwise_is_refused(change, reason):
    model = MODELS["swin"]()
    for part, settings in change.items():
        model[part].update(settings)
    with pytest.raises(ValueError, match=reason):
        segmentor_format(build_on_meta(model))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(pixel_decoder=dict(norm_cfg=dict(type="GN", num_groups=8))), "no group norms of 32 groups"),
        (
            dict(pixel_decoder=dict(encoder=dict(transformerlayers=dict(attn_cfgs=dict(num_points=2))))),
            "num_points=2",
        ),
        (
            dict(pixel_decoder=dict(encoder=dict(transformerlayers=dict(attn_cfgs=dict(num_heads=2))))),
            "2 heads of the pixel decoder and 4",
        ),
        (
            dict(positional_encoding=dict(temperature=20)),
            r"decode_head\.positional_encoding is no normalised",
        ),
        (dict(pixel_decoder=dict(act_cfg=dict(type="GELU"))), "no ReLU"),
        (dict(in_index=[0, 1, 2, 2], in_channels=[12, 24, 48, 48]), "not all maps of the backbone"),
    ],
)
def test_what_mask2former_there_would_compute_otherwise_is_refused(change, reason):
    model = MODELS["mask2former_swin"]()
    model.decode_head = Config._merge_a_into_b(ConfigDict(change), model.decode_head)
    with pytest.raises(ValueError, match=reason):
        segmentor_format(build_on_meta(model))


def test_a_segmentor_that_transformers_does_not_have_is_refused_with_those_that_it_has():
    model = internvit()
    model.decode_head = dict(type="PSPHead", in_channels=32, channels=8, num_classes=7)
    with pytest.raises(
        ValueError, match=r"no class for EncoderDecoder with PSPHead on InternViT6B; .*UPerHead"
    ):
        segmentor_format(build_on_meta(model))


@pytest.mark.parametrize("name", ["eomt_timm", "mask2former_swin", "mask2former_internimage"])
def test_the_code_of_a_model_card_segments_with_what_the_folder_says_of_images(name, folders, monkeypatch):
    segmentor, folder, _ = folders[name]
    experiment = replace(read_experiment(small_eomt.CONFIG), model=MODELS[name]())
    found = segmentor_format(build_on_meta(experiment.model))
    fields = preprocessor_config(experiment, found.processor, splits=found.splits_images)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields | found.processor_fields))
    monkeypatch.chdir(folder.parent)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    cv2.imwrite("image.png", pixels[..., ::-1])
    code = usage_of(found, folder.name, experiment, fields).replace("image.jpg", "image.png")
    names: dict = {}
    exec(code.partition("# or,")[0], names)
    if name == "eomt_timm":
        mean, std = ([255 * value for value in fields[f"image_{part}"]] for part in ("mean", "std"))
        image = torch.from_numpy((pixels - mean) / std).float().permute(2, 0, 1)[None]
    else:
        image = names["inputs"]["pixel_values"]
        assert image.shape[2:] == (112, 112)
    with torch.no_grad():
        logits = segmentor.encode_decode(image, [{}])
    outputs = names["outputs"]
    scores = [outputs.masks_queries_logits], [outputs.class_queries_logits]
    theirs = of_queries(dict(zip(QUERIES, scores)), 0, logits.shape[2:])
    torch.testing.assert_close(theirs, logits, rtol=1e-4, atol=1e-4)
    ours = nn.functional.interpolate(logits, (SIDE, SIDE), mode="bilinear")[0].argmax(0)
    assert len(ours.unique()) > 1 or name != "eomt_timm"
    # their processor enlarges masks before the sigmoid, ours behind it: borders differ
    assert float((names["labels"] == ours).float().mean()) > 0.97


FIVE = dict(type="Normalize", mean=[9000.0, 1, 2, 3, 4], std=[9000.0, 8000, 7000, 9000, 9000], to_rgb=False)
LOADERS = {
    "raster": dict(type="LoadRaster", nodata=7),
    "chosen": dict(type="LoadRaster", channels=[5, 1, 4, 2, 3]),
    "opencv": dict(type="LoadImageFromFile", color_type="unchanged"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_the_code_of_a_model_card_reads_rasters_as_the_pipeline_does(loader, tmp_path, monkeypatch):
    channels = 4 if loader == "opencv" else 5
    model = probe(internvit(in_chans=channels, with_fpn=False, out_indices=[3]), 32)
    segmentor = drawn(model)
    folder = write_folder(segmentor, tmp_path / "five")
    cfg = Config(read_experiment(small_eomt.CONFIG).cfg.to_dict())
    normalize = dict(FIVE, mean=FIVE["mean"][:channels], std=FIVE["std"][:channels])
    ends = [dict(type="ImageToTensor", keys=["img"]), dict(type="Collect", keys=["img"])]
    flip = dict(type="MultiScaleFlipAug", img_scale=None, img_ratios=[1.0], flip=False)
    steps = [dict(type="Resize", keep_ratio=True), dict(type="RandomFlip"), normalize, *ends]
    cfg.data.test.pipeline = [LOADERS[loader], dict(flip, transforms=steps)]
    experiment = replace(read_experiment(cfg), model=model)
    found = segmentor_format(build_on_meta(model))
    fields = preprocessor_config(experiment, found.processor, splits=False)
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 60_000, (112, 112, channels)).astype(np.uint16)
    colours = dict(photometric="RGB", alpha="unspecified") if loader == "opencv" else {}
    written(tmp_path / "image.tif", image, nodata=int(image[3, 3, 1]), **colours)
    names: dict = {}
    exec(usage_of(found, folder.name, experiment, fields).partition("# or,")[0], names)
    pixels = ImageFiles([tmp_path / "image.tif"], cfg.data.test.pipeline)[0]["img"][0][None]
    torch.testing.assert_close(names["pixel_values"], pixels, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        expected = segmentor.encode_decode(pixels, [{}])
    torch.testing.assert_close(names["outputs"].logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(names["labels"], names["outputs"].logits[0].argmax(0))


@pytest.mark.parametrize(
    "model", [lambda: internimage(in_channels=5), lambda: dict(MODELS["vit_adapter"]())], ids=["image", "vit"]
)
def test_a_folder_holds_a_backbone_of_five_channels(model):
    model = ConfigDict(model())
    if model.backbone.type == "InternViTAdapter":
        model.backbone.in_chans = 5
    found = segmentor_format(build_on_meta(model))
    assert "'num_channels': 5" in str(found.config)
