"""One checkpoint, one score: whatever form the weights are in, and however many processes look at the
images."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmseg.datasets import ADE20KDataset

from internseg_ds.data.datasets import build_datasets
from internseg_ds.evaluation.test import published_classes
from tests.conftest import TINY, data_options
from tests.end_to_end.conftest import SMALL


@pytest.fixture(scope="module")
def one_file(trained, launch, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "segmentor.pth"
    launch("launch/consolidate.py", trained.work_dir / "checkpoints", out, launcher="python")
    return out


def test_the_score_is_the_same_from_shards_and_file_and_with_1_and_2_processes(
    trained, one_file, launch, ade20k, tmp_path
):
    results, fp32 = [], "engine.backbone_dtype=float32"  # partitioned weights have one dtype, heads included
    for number, (checkpoint, processes, launcher) in enumerate(
        [(trained.work_dir / "checkpoints", 2, "deepspeed"), (one_file, 1, "forks")]
    ):
        out = tmp_path / str(number)
        launch(
            "launch/test.py",
            TINY,
            checkpoint,
            "--eval",
            "mIoU",
            "--out",
            out,
            "--cfg-options",
            *SMALL,
            *data_options(ade20k),
            fp32,
            processes=processes,
            launcher=launcher,
        )
        results.append((out / "results.json").read_text())
    out = tmp_path / "partitioned"  # by ZeRO-3, the forwards in step
    launch(
        "launch/test.py",
        TINY,
        one_file,
        "--eval",
        "mIoU",
        "--out",
        out,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        "engine.evaluation_weights=partitioned",
        fp32,
    )
    results.append((out / "results.json").read_text())
    assert len(set(results)) == 1
    # training evaluates bf16 copies of the same weights
    assert json.loads(results[0])["mIoU"] == pytest.approx(trained.scores[12], abs=0.5)


def test_the_one_file_is_an_ordinary_mmseg_checkpoint(one_file):
    from mmcv import Config
    from mmseg.models import build_segmentor

    import internseg_ds.models  # noqa: F401

    content = torch.load(one_file, weights_only=True)
    assert (
        content["meta"]["iter"] == 12
        and len(content["meta"]["CLASSES"]) == 150
        and content["meta"]["mIoU"] is not None
    )
    config = one_file.with_name("config.py")
    config.write_text(content["meta"]["config"])
    build_segmentor(Config.fromfile(config).model).load_state_dict(content["state_dict"], strict=True)
    assert all(value.dtype in (torch.float32, torch.int64) for value in content["state_dict"].values())


def test_pictures_show_image_truth_and_prediction(one_file, launch, ade20k, tmp_path):
    launch(
        "launch/test.py",
        TINY,
        one_file,
        "--show-dir",
        tmp_path,
        "--show-count",
        3,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        processes=1,
    )
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 3
    height, width, _ = cv2.imread(str(pictures[0])).shape
    assert width > 2 * 200 and height > 256


def test_a_prediction_overwrites_no_image(one_file, launch, ade20k, tmp_path):
    for name in ("a.jpg", "a_labels.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((20, 20, 3), np.uint8))
    before = (tmp_path / "a_labels.png").read_bytes()
    done = launch(
        "launch/predict.py",
        TINY,
        one_file,
        tmp_path,
        "--out",
        tmp_path,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        processes=1,
        check=False,
    )
    assert (
        done.returncode == 2
        and "would overwrite the image" in done.stderr
        and (tmp_path / "a_labels.png").read_bytes() == before
    )


def test_predict_labels_are_those_of_the_evaluation(one_file, launch, ade20k, tmp_path):
    launch(
        "launch/predict.py",
        TINY,
        one_file,
        ade20k / "images/validation",
        "--out",
        tmp_path,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        launcher="python",
    )
    maps = sorted(tmp_path.glob("*_labels.png"))
    assert len(maps) == len(list(tmp_path.glob("*_overlay.png"))) == 7
    hits = np.zeros(3)
    for path in maps:
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        truth = cv2.imread(
            str(ade20k / "annotations/validation" / path.name.replace("_labels", "")), cv2.IMREAD_UNCHANGED
        )
        assert labels.shape == truth.shape
        valid = truth > 0
        hits += [(labels[valid] == truth[valid] - 1).sum(), valid.sum(), 0]
    out = tmp_path / "evaluation"
    launch(
        "launch/test.py",
        TINY,
        one_file,
        "--out",
        out,
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
        processes=1,
        launcher="python",
    )
    results = json.loads((out / "results.json").read_text())
    assert results["unit"] == "percent" and 100 * hits[0] / hits[1] == pytest.approx(
        results["aAcc"], abs=1e-2
    )


def test_a_submission_has_ade20ks_files(one_file, launch, ade20k, tmp_path):
    """Labels 1 to 150, of the image's size, without any ground truth at hand."""
    options = [*data_options(ade20k), "data.test.ann_dir=annotations/nowhere"]
    launch(
        "launch/test.py",
        TINY,
        one_file,
        "--format-only",
        tmp_path / "files",
        "--cfg-options",
        *SMALL,
        *options,
    )
    launch(
        "launch/predict.py",
        TINY,
        one_file,
        ade20k / "images/validation",
        "--out",
        tmp_path / "predicted",
        "--cfg-options",
        *SMALL,
        *options,
    )
    files = sorted((tmp_path / "files").iterdir())
    assert len(files) == 7
    for file in files:
        predicted = cv2.imread(str(tmp_path / "predicted" / f"{file.stem}_labels.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), predicted + 1)


def test_a_submission_numbers_chosen_classes_as_the_benchmark_does(ade20k, tmp_path):
    entry = dict(
        type="ADE20KDataset",
        data_root=str(ade20k),
        img_dir="images/validation",
        ann_dir="annotations/validation",
        pipeline=[],
        classes=["sky", "wall"],
    )
    dataset = build_datasets(entry, "data.test", test_mode=True)
    numbers = published_classes(dataset, 3)
    assert [ADE20KDataset.CLASSES[number] for number in numbers[:2]] == ["sky", "wall"] and numbers[2] == 2
    dataset.format_results([numbers[np.array([[0, 1]])]], str(tmp_path), indices=[0])
    (file,) = tmp_path.iterdir()
    # in the benchmark's files 1 is wall, 3 is sky
    assert cv2.imread(str(file), cv2.IMREAD_UNCHANGED).tolist() == [[3, 1]]


def test_predict_takes_globs_and_names_what_it_cannot_read(one_file, launch, ade20k, tmp_path):
    frames = tmp_path / "frames" / "deep"
    frames.mkdir(parents=True)
    for number, file in enumerate(sorted((ade20k / "images/validation").iterdir())[:3]):
        shutil.copy(file, frames / f"frame_{number}.jpg")
    (frames / "frame_3.jpg").write_bytes(b"no image")
    arguments = [
        "launch/predict.py",
        TINY,
        one_file,
        str(tmp_path / "frames/**/*.jpg"),
        "--logits",
        "--out",
        tmp_path / "out",
        "--cfg-options",
        *SMALL,
        *data_options(ade20k),
    ]
    done = launch(*arguments, processes=1)
    said = done.stdout + done.stderr
    assert "1 of 4 images cannot be read" in said and "frame_3.jpg" in said
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 3
    for path in (tmp_path / "out").glob("*_logits.npy"):
        logits, labels = (
            np.load(path),
            cv2.imread(str(path).replace("_logits.npy", "_labels.png"), cv2.IMREAD_UNCHANGED),
        )
        assert logits.dtype == np.float32 and np.array_equal(logits.argmax(0), labels)
    done = launch(*arguments[:5], "--strict", *arguments[5:], check=False)  # on the second process
    assert (
        done.returncode
        and "frame_3.jpg" in done.stderr
        and "Traceback" not in done.stderr.split("frame_3.jpg")[0]
    )
