"""The images that an evaluation keeps: which, from all ranks, and at what size."""

import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist

from internseg_ds.data.label_maps import ground_truth
from internseg_ds.distributed.process_group import World
from internseg_ds.evaluation import kept_pictures
from internseg_ds.evaluation.evaluator import Evaluation, confusion_matrix, image_score
from internseg_ds.evaluation.kept_pictures import KeptEvaluation, KeptPictures
from internseg_ds.monitoring.evaluation_record import NO_CLASS
from tests.distributed.ranks import spawn
from tests.evaluation.test_evaluator import validation

SCORES = [0.4, 0.1, None, 0.9, 0.5, 0.2, 0.3]
"""Of the 7 validation images."""


def labels_of(dataset, index):
    truth = ground_truth(dataset, index)
    return np.where(truth == 255, 0, truth).astype(np.int64)


def observed(dataset, indices):
    kept = KeptPictures(dataset)
    for index in indices:
        kept.observe(index, labels_of(dataset, index), SCORES[index])
    return kept


def names(dataset, pictures, sort):
    numbers = {info["filename"]: number for number, info in enumerate(dataset.img_infos)}
    return [numbers[shown.name] for shown in pictures if shown.sort == sort]


def kept_by_two_ranks(root):
    dataset = validation(root)
    found = observed(dataset, range(dist.get_rank(), 7, dist.get_world_size())).gathered()
    assert names(dataset, found, "fixed") == [0, 2, 4, 6]
    assert names(dataset, found, "best") == [3, 4, 0]
    assert names(dataset, found, "worst") == [1, 5, 6]
    for shown in found:
        (index,) = names(dataset, [shown], shown.sort)
        assert shown.score == SCORES[index]
        truth = ground_truth(dataset, index).astype(np.int64)
        assert (shown.truth == np.where(truth == 255, NO_CLASS, truth)).all()
        assert (shown.prediction == labels_of(dataset, index)).all()
        assert shown.image.shape == (*truth.shape, 3)


def test_the_fixed_the_best_and_the_worst_of_all_ranks_are_kept(ade20k):
    spawn(kept_by_two_ranks, 2, ade20k)


def test_large_images_are_made_small_and_one_that_cannot_be_shown_is_left_out(ade20k, monkeypatch, caplog):
    dataset = validation(ade20k)
    monkeypatch.setattr(kept_pictures, "SIDE", 20)
    kept = observed(dataset, range(7))
    dataset.img_infos[0] = {"filename": "gone.jpg", "ann": {"seg_map": "gone.png"}}
    with caplog.at_level(logging.WARNING, logger="internseg_ds"):
        found = kept.gathered()
    assert "gone.jpg" in caplog.text and names(dataset, found, "fixed") == [2, 4, 6]
    for shown in found:
        assert max(shown.image.shape[:2]) == 20
        assert shown.image.shape[:2] == shown.truth.shape == shown.prediction.shape


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_has_the_record(ade20k, rank):
    dataset = validation(ade20k)
    truth = torch.from_numpy(np.asarray(ground_truth(dataset, 0)))
    confusion = confusion_matrix(torch.from_numpy(labels_of(dataset, 0)), truth, 150, 255)
    assert image_score(confusion) == 1
    kept = KeptEvaluation()
    (observer,) = kept.observers(0, dataset)
    observer.observe(0, labels_of(dataset, 0), 1.0)
    record = kept.record(3, Evaluation({"mIoU": 1.0}, confusion, 1, []), dataset, World(rank, 2, rank))
    if rank:
        assert record is None
    else:
        assert record is not None and record.step == 3 and record.palette.shape == (150, 3)
        assert np.nanmin(record.iou) == 1 and len(record.pictures) == 3
