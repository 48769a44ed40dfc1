"""A fine-tuned backbone goes back to where its weights came from: transformers computes the same features
with it, and it starts another run. A segmentor goes out as a folder, and segments alike from any of its forms."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmcv import Config
from mmseg.apis import inference_segmentor, init_segmentor
from PIL import Image

from internseg_ds import Segmenter
from internseg_ds.checkpoints.checksum_files import verify
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import read_experiment
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.export import export_backbone
from internseg_ds.evaluation.huggingface import export_huggingface
from internseg_ds.evaluation.inference import load_trained
from tests.conftest import ROOT


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


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The best of the trained segmentors, of which WORK_DIR/evaluation is, as transformers loads it."""
    return export_huggingface(trained.work_dir, tmp_path_factory.mktemp("models") / "scenes", tag="best")


def test_a_folder_says_what_is_in_it(trained, folder):
    verify(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["id2label"]["2"] == "sky" and config["label2id"]["sky"] == 2 and config["dtype"] == "float32"
    )
    assert len(config["id2label"]) == len(config["palette"]) == 150 and config["palette"][2] == [6, 230, 230]
    processing = json.loads((folder / "preprocessor_config.json").read_text())
    assert (
        processing["size"] == {"shortest_edge": 112, "longest_edge": 448} and processing["do_reduce_labels"]
    )
    assert processing["windows"] == {"mode": "slide", "crop_size": [112, 112], "stride": [70, 70]}
    np.testing.assert_allclose(processing["image_mean"], [0.485, 0.456, 0.406])
    assert (folder / "confusion.png").read_bytes() == (
        trained.work_dir / "evaluation/confusion.png"
    ).read_bytes()
    card = (folder / "README.md").read_text()
    results = json.loads((trained.work_dir / "evaluation/results.json").read_text())
    step = next(step for step, score in trained.scores.items() if step and score == results["mIoU"])
    sky = results["classes"]["sky"]
    assert f"mIoU {results['mIoU']:.2f} %" in card and "](confusion.png)" in card
    assert f"| sky | {sky['IoU']:.2f} | {sky['Acc']:.2f} |" in card
    assert (
        f"trained on generated scenes in the layout of ADE20K for {step} of 12 steps" in card
        and "| batch | 4 images |" in card
    )
    assert "Trained with python" in card and "random weights" in card


def test_transformers_prepares_images_and_labels_from_the_folder(folder, ade20k):
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
    image = Image.open(sorted((ade20k / "images/validation").glob("*.jpg"))[0])
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=image, return_tensors="pt")
    assert min(inputs["pixel_values"].shape[2:]) == 112
    with torch.no_grad():
        outputs = model(**inputs)
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
    ours = Segmenter.from_pretrained(folder, device="cpu")(image)
    assert labels.shape == ours.labels.shape  # by whole images in fp32, and by windows in bf16


def test_a_segmenter_gives_the_same_labels_from_each_form_of_the_weights(trained, folder, ade20k, tmp_path):
    image = sorted((ade20k / "images/validation").glob("*.jpg"))[0]
    forms = [
        ZeroCheckpoint.open(trained.work_dir, "best").path,
        consolidate(trained.work_dir, tmp_path / "segmentor.pth", tag="best"),
        consolidate(trained.work_dir, tmp_path / "segmentor.safetensors", tag="best"),
        folder,
    ]
    results = [Segmenter.from_pretrained(form, device="cpu")(image) for form in forms]
    for found in results[1:]:
        assert np.array_equal(found.labels, results[0].labels)
        assert np.array_equal(found.scores, results[0].scores)


def test_mmsegs_own_interface_loads_what_a_run_was_consolidated_to(trained, ade20k, tmp_path):
    weights = consolidate(trained.work_dir, tmp_path / "segmentor.pth")
    config = Config.fromfile(trained.work_dir / "config.py")
    config.merge_from_dict({"engine.backbone_dtype": "float32"})  # as mmseg computes
    config.dump(str(tmp_path / "config.py"))
    model = init_segmentor(str(tmp_path / "config.py"), str(weights), device="cpu")
    segmenter = Segmenter.from_pretrained(weights, config=tmp_path / "config.py", device="cpu")
    assert tuple(model.CLASSES) == segmenter.classes
    for image in sorted((ade20k / "images/validation").glob("*.jpg"))[:2]:
        (labels,) = inference_segmentor(model, str(image))
        assert np.array_equal(labels, segmenter(image).labels)


def test_a_folder_with_an_ending_and_an_unknown_format_are_refused(trained, launch, tmp_path):
    with pytest.raises(CheckpointError, match="a folder, whose name has no ending"):
        export_huggingface(trained.work_dir, tmp_path / "model.safetensors")
    for options, message in (
        (["--format", "hugingface"], "did you mean huggingface?"),
        (["--push-to-hub", "somebody/scenes"], "give that too"),
        (["--format", "huggingface", "--adapters"], "give one of them"),
    ):
        done = launch(
            "launch/consolidate.py", trained.work_dir, tmp_path / "out", *options, processes=1, check=False
        )
        assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_picture_of_the_run_is_in_the_card_and_goes_when_it_is_of_another_evaluation(trained, tmp_path):
    work_dir = tmp_path / "run"
    shutil.copytree(trained.work_dir, work_dir)
    (work_dir / "evaluation/best").mkdir()
    (work_dir / "evaluation/best/01_50.0_a.png").write_bytes(b"a picture")
    out = export_huggingface(work_dir, tmp_path / "scenes", tag="best")
    assert (out / "prediction.png").read_bytes() == b"a picture"
    assert "](prediction.png)" in (out / "README.md").read_text()
    results = json.loads((work_dir / "evaluation/results.json").read_text())
    (work_dir / "evaluation/results.json").write_text(json.dumps(results | {"mIoU": results["mIoU"] + 10}))
    export_huggingface(work_dir, out, tag="best", overwrite=True)
    assert not (out / "prediction.png").exists() and not (out / "confusion.png").exists()
    assert f"mIoU {results['mIoU']:.2f} %" in (out / "README.md").read_text()


def test_the_example_of_the_documentation_segments_a_folder(trained, ade20k, launch, tmp_path):
    images = ade20k / "images/validation"
    done = launch(
        "docs/segment_images.py", trained.work_dir, images, "--out", tmp_path / "pictures", processes=1
    )
    names = sorted(file.stem for file in images.glob("*.jpg"))
    assert [file.stem for file in sorted((tmp_path / "pictures").glob("*.png"))] == names
    assert [line.partition(".jpg: ")[0] for line in done.stdout.splitlines() if ".jpg: " in line] == names
    page = (ROOT / "docs/using_models.md").read_text()
    assert "python docs/segment_images.py WEIGHTS IMAGES --out pictures" in page
