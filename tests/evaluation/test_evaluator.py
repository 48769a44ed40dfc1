"""Counts and scores against mmseg's own functions, what happens to images that cannot be read, and what a
report holds."""

import csv
import json
import logging
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmcv import Config
from mmseg.core.evaluation import intersect_and_union
from mmseg.datasets import ConcatDataset

from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.label_maps import ground_truth
from internseg_ds.data.loading import EvaluationImage
from internseg_ds.distributed.gathering import Forwards
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import DataError
from internseg_ds.evaluation.evaluator import (
    EvaluationOptions,
    areas,
    confusion_matrix,
    evaluate_dataset,
    evaluate_datasets,
    image_score,
)
from internseg_ds.evaluation.predict import DownscaledImages
from internseg_ds.evaluation.report import BestAndWorst, FirstImages, write_report
from tests.conftest import ROOT, TINY


def validation_entry(root):
    entry = Config.fromfile(ROOT / TINY).data.val
    entry.data_root = str(root)
    return entry


def validation(root):
    entry = validation_entry(root)
    return build_datasets(entry, "data.val", test_mode=True)


def test_counts_are_those_of_mmseg():
    random = np.random.default_rng(0)
    # 12, 200: no classes
    labels, truth = (
        random.integers(0, 9, (50, 40)),
        random.choice([0, 1, 2, 3, 5, 8, 12, 200, 255], (50, 40)).astype(np.uint8),
    )
    expected = torch.stack(intersect_and_union(labels, truth.copy(), 9, 255))
    confusion = confusion_matrix(torch.from_numpy(labels), torch.from_numpy(truth), 9, 255)
    assert torch.equal(areas(confusion), expected.double())
    assert confusion.sum() == (truth != 255).sum()
    assert (
        confusion[5, 2] == ((truth == 5) & (labels == 2)).sum()
        and confusion[9, 4] == (((truth == 12) | (truth == 200)) & (labels == 4)).sum()
    )
    present = expected[1] > 0
    assert image_score(confusion) == pytest.approx(
        (expected[0][present] / expected[1][present]).mean().item()
    )


def test_scores_are_those_of_mmsegs_test_loop(tiny, ade20k):
    from mmcv.parallel import MMDataParallel
    from mmseg.apis import single_gpu_test
    from mmseg.datasets import build_dataloader, build_dataset

    dataset, theirs = validation(ade20k), build_dataset(validation_entry(ade20k), dict(test_mode=True))
    loader = build_dataloader(theirs, 1, 0, dist=False, shuffle=False, persistent_workers=False)
    expected = theirs.evaluate(
        single_gpu_test(MMDataParallel(tiny, device_ids=[-1]), loader, pre_eval=True),
        metric=["mIoU", "mDice", "mFscore"],
        logger="silent",
    )
    found = evaluate_dataset(
        Forwards(tiny),
        dataset,
        EvaluationOptions(World(), workers=0, metrics=["mIoU", "mDice", "mFscore"], verbose=False),
    )
    assert found.images == 7 and not found.faults
    # theirs are rounded in fp32
    assert found.metrics == pytest.approx(
        {name: float(value) for name, value in expected.items() if not np.isnan(value)}, abs=1e-6
    )
    assert {"mIoU", "mDice", "mFscore", "aAcc", "mAcc"} <= set(found.metrics)


def test_classes_without_a_labelled_pixel_are_named_once(tiny, ade20k, tmp_path, caplog):
    dataset = validation(ade20k)
    with caplog.at_level(logging.INFO):
        found = evaluate_dataset(Forwards(tiny), dataset, EvaluationOptions(World(), workers=0))
    there = set(np.unique([label for index in range(7) for label in np.unique(ground_truth(dataset, index))]))
    absent = [name for index, name in enumerate(dataset.CLASSES) if index not in there]
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("absent: "))
    assert line.startswith(f"absent: {len(absent)} of 150 classes") and f"({absent[0]}, {absent[1]}, " in line
    scored = [name for name in absent if f"IoU.{name}" in found.metrics]
    assert f"IoU of 0 for the {len(scored)} that are predicted" in line and scored
    assert {found.metrics[f"IoU.{name}"] for name in scored} == {0.0}
    write_report(found, dataset.CLASSES, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["absent_classes"] == absent


@pytest.fixture
def damaged(ade20k, tmp_path):
    """Image 1 is empty, the label map of image 2 is half as wide as its image."""
    shutil.copytree(ade20k, tmp_path / "ade")
    images, labels = (
        sorted((tmp_path / "ade" / kind / "validation").iterdir()) for kind in ("images", "annotations")
    )
    images[1].write_bytes(b"")
    cv2.imwrite(str(labels[2]), cv2.imread(str(labels[2]), cv2.IMREAD_UNCHANGED)[:, ::2])
    return tmp_path / "ade", images


def test_images_that_cannot_be_read_are_left_out_counted_and_named(tiny, damaged, caplog):
    root, images = damaged
    caplog.set_level(logging.WARNING)
    found = evaluate_dataset(
        Forwards(tiny), validation(root), EvaluationOptions(World(), workers=1, verbose=False)
    )
    assert found.images == 5 and len(found.faults) == 2
    for image in images[1:3]:
        assert sum(image.name in fault for fault in found.faults) == 1 and image.name in caplog.text
    assert "2 of 7 images" in caplog.text
    whole = validation(root)
    whole.img_infos = [info for number, info in enumerate(whole.img_infos) if number not in (1, 2)]
    assert (
        found.metrics
        == evaluate_dataset(
            Forwards(tiny), whole, EvaluationOptions(World(), workers=0, verbose=False)
        ).metrics
    )


def test_strict_makes_the_first_of_them_an_error(tiny, damaged):
    root, images = damaged
    with pytest.raises(DataError, match=images[1].name):
        evaluate_dataset(
            Forwards(tiny),
            validation(root),
            EvaluationOptions(World(), workers=0, strict=True, verbose=False),
        )


def test_no_image_at_all_is_an_error(tiny, damaged):
    root, images = damaged
    for image in images:
        image.write_bytes(b"")
    with pytest.raises(DataError, match="7 images"):
        evaluate_dataset(
            Forwards(tiny), validation(root), EvaluationOptions(World(), workers=0, verbose=False)
        )


def test_a_report_holds_the_scores_and_the_best_and_worst_images(tiny, ade20k, tmp_path):
    dataset, scores = validation(ade20k), {}

    class Recording:
        def observe(self, index, labels, score):
            scores[index] = score

    extremes = BestAndWorst(dataset, 2)
    found = evaluate_dataset(
        Forwards(tiny),
        dataset,
        EvaluationOptions(World(), workers=0, verbose=False),
        observers=[extremes, Recording()],
    )
    for _ in range(2):  # a second report replaces the first
        write_report(found, dataset.CLASSES, tmp_path)
        extremes.write(tmp_path, World())
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        results["mIoU"] == pytest.approx(100 * found.metrics["mIoU"])
        and results["images"] == 7
        and results["not_read"] == []
    )
    name = next(name for name, scores_of in results["classes"].items() if scores_of.get("IoU"))
    assert results["classes"][name]["IoU"] == pytest.approx(100 * found.metrics[f"IoU.{name}"])
    rows = list(csv.DictReader((tmp_path / "per_class.csv").open()))
    assert [row["class"] for row in rows] == list(dataset.CLASSES)
    assert float(next(row for row in rows if row["class"] == name)["IoU %"]) == pytest.approx(
        100 * found.metrics[f"IoU.{name}"], abs=1e-2
    )
    assert sum(int(row["predicted_pixels"]) for row in rows) == found.confusion.sum()
    assert cv2.imread(str(tmp_path / "confusion.png")).shape[0] > 300
    ranked = sorted(scores, key=scores.get)
    for name, indices in (("worst", ranked[:2]), ("best", ranked[:-3:-1])):
        files = sorted((tmp_path / name).iterdir())
        assert len(files) == 2
        for file, index in zip(files, indices):
            stem = dataset.img_infos[index]["filename"].removesuffix(".jpg")
            assert file.stem.endswith(stem) and f"_{100 * scores[index]:.1f}_" in file.name
            assert cv2.imread(str(file)).shape[1] > 300


def test_labels_that_are_no_class_count_as_wrong_and_are_told(tiny, ade20k, tmp_path, caplog):
    shutil.copytree(ade20k, tmp_path / "ade")
    labels = sorted((tmp_path / "ade/annotations/validation").iterdir())[0]
    changed = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
    changed[:5] = 200
    cv2.imwrite(str(labels), changed)
    found = evaluate_dataset(
        Forwards(tiny), validation(tmp_path / "ade"), EvaluationOptions(World(), workers=0, verbose=False)
    )
    assert (
        found.confusion[-1].sum() == 5 * changed.shape[1]
        and f"{5 * changed.shape[1]} labelled pixels" in caplog.text
    )


def test_images_without_any_label_have_no_score(tiny, ade20k, tmp_path):
    shutil.copytree(ade20k, tmp_path / "ade")
    files = sorted((tmp_path / "ade/annotations/validation").iterdir())
    for file in files[1:]:
        cv2.imwrite(str(file), np.zeros_like(cv2.imread(str(file), cv2.IMREAD_UNCHANGED)))
    extremes = BestAndWorst(validation(tmp_path / "ade"), 3)
    evaluate_dataset(
        Forwards(tiny),
        validation(tmp_path / "ade"),
        EvaluationOptions(World(), workers=0, verbose=False),
        observers=[extremes],
    )
    extremes.write(tmp_path, World())
    assert len(list((tmp_path / "worst").iterdir())) == 1
    cv2.imwrite(str(files[0]), np.zeros_like(cv2.imread(str(files[0]), cv2.IMREAD_UNCHANGED)))
    with pytest.raises(DataError, match=r"7 images .*reduce_zero_label"):
        evaluate_dataset(
            Forwards(tiny), validation(tmp_path / "ade"), EvaluationOptions(World(), workers=0, verbose=False)
        )


def test_a_pipeline_without_augmentation_and_a_choice_of_classes_work(tiny, ade20k):
    cfg = Config.fromfile(ROOT / TINY)
    entry = cfg.data.val
    entry.data_root = str(ade20k)
    expected = evaluate_dataset(
        Forwards(tiny),
        build_datasets(entry, "data.val", test_mode=True),
        EvaluationOptions(World(), workers=0, verbose=False),
    )
    flat = [
        entry.pipeline[0],
        dict(entry.pipeline[1].transforms[0], img_scale=entry.pipeline[1].img_scale),
        *entry.pipeline[1].transforms[1:],
    ]
    flat[3] = dict(type="RandomFlip", prob=0.0)
    plain = Config(dict(entry, pipeline=flat))._cfg_dict
    found = evaluate_dataset(
        Forwards(tiny),
        build_datasets(plain, "data.val", test_mode=True),
        EvaluationOptions(World(), workers=0, verbose=False),
    )
    assert torch.equal(found.confusion, expected.confusion)
    chosen = Config(dict(entry, classes=["sky", "tree", "grass"]))._cfg_dict
    dataset = build_datasets(chosen, "data.val", test_mode=True)
    assert set(np.unique(dataset.get_gt_seg_map_by_idx(0))) <= {0, 1, 2, 255}


def test_pictures_of_absolute_names_stay_in_their_folder(ade20k, tmp_path):
    dataset = validation(ade20k)
    for info in dataset.img_infos:
        info["filename"] = str(ade20k / "images/validation" / info["filename"])
    shower = FirstImages(dataset, tmp_path / "shown", 2)
    for index in range(3):
        shower.observe(index, np.zeros(ground_truth(dataset, index).shape, np.int64), 0.5)
    written = sorted((tmp_path / "shown").iterdir())
    assert len(written) == 2 and all(
        path.name.endswith(f"images_validation_ADE_val_{number:08d}.png")
        for number, path in enumerate(written, 1)
    )


def test_images_that_are_segmented_at_a_smaller_size_are_told(tmp_path, caplog):
    def image(index, height, width, *sizes):
        metas = [[{"img_shape": (*size, 3), "ori_shape": (height, width, 3)}] for size in sizes]
        return EvaluationImage(index, {"img_metas": metas})

    caplog.set_level(logging.INFO)
    downscaled = DownscaledImages([tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg")])
    seen = list(
        downscaled.record(
            [
                image(0, 100, 200, (100, 200)),
                image(1, 2000, 3000, (504, 756)),
                image(2, 100, 200, (50, 100), (100, 200)),
            ]
        )
    )
    downscaled.log_summary()
    assert [index for index, _ in seen] == [0, 1, 2]
    (message,) = caplog.messages
    for fact in ("1 of 3 images", "b.jpg of 2000 x 3000 pixels", "504 x 756", "img_scale"):
        assert fact in message


def test_outputs_beyond_the_classes_count_as_wrong_as_in_mmseg():
    random = np.random.default_rng(0)
    labels, truth = random.integers(0, 12, (50, 40)), random.integers(0, 9, (50, 40)).astype(np.uint8)
    confusion = confusion_matrix(torch.from_numpy(labels), torch.from_numpy(truth), 9, 255)
    assert torch.equal(
        areas(confusion), torch.stack(intersect_and_union(labels, truth.copy(), 9, 255)).double()
    )
    assert confusion[:, -1].sum() == (labels >= 9).sum() > 0 and confusion.sum() == truth.size


def test_a_model_with_more_outputs_than_the_data_set_has_classes_is_scored_and_told(
    tiny, ade20k, tmp_path, caplog
):
    entry = validation_entry(ade20k)
    entry.classes = ["wall", "building", "sky"]  # the first three of the model's 150 outputs
    dataset = build_datasets(entry, "data.val", test_mode=True)
    caplog.set_level(logging.WARNING)
    found = evaluate_dataset(Forwards(tiny), dataset, EvaluationOptions(World(), workers=0, verbose=False))
    write_report(found, dataset.CLASSES, tmp_path)
    beyond = json.loads((tmp_path / "results.json").read_text())["predictions_of_no_class"]
    assert beyond == found.confusion[:, -1].sum() > 0 and f"{beyond} pixels" in caplog.text


def test_joined_data_sets_are_scored_each_and_together(tiny, ade20k):
    entry = validation_entry(ade20k)
    whole = validation(ade20k)
    names = [info["filename"] for info in whole.img_infos]
    alone = [
        evaluate_dataset(
            Forwards(tiny), some_of(entry, names[part]), EvaluationOptions(World(), workers=0, verbose=False)
        )
        for part in (slice(3), slice(3, 7))
    ]
    joined = ConcatDataset([some_of(entry, names[part]) for part in (slice(3), slice(3, 7))])
    found = evaluate_datasets(Forwards(tiny), joined, EvaluationOptions(World(), workers=0, verbose=False))
    together = evaluate_dataset(Forwards(tiny), whole, EvaluationOptions(World(), workers=0, verbose=False))
    assert found.images == 7 and torch.equal(found.confusion, together.confusion)
    assert {name: value for name, value in found.metrics.items() if name[0] not in "01"} == together.metrics
    for number, each in enumerate(alone):
        assert {
            name.removeprefix(f"{number}_"): value
            for name, value in found.metrics.items()
            if name.startswith(f"{number}_")
        } == each.metrics


def some_of(entry, names):
    dataset = build_datasets(entry, "data.val", test_mode=True)
    dataset.img_infos = [info for info in dataset.img_infos if info["filename"] in names]
    return dataset
