import gc
import os
import random
import re
import shutil
import signal
import subprocess
import time
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from mmcv import Config
from mmseg.datasets import DATASETS, CustomDataset
from mmseg.datasets.builder import PIPELINES

from internseg_ds.data.datasets import build_datasets
from internseg_ds.data.loading import evaluation_images, training_batches
from internseg_ds.data.sampler import GlobalBatchSampler
from internseg_ds.data.samples import first_sample
from internseg_ds.errors import DataError
from tests.conftest import ROOT, TINY, free_port
from tests.forks import start_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(ade20k):
    data = Config.fromfile(ROOT / TINY).data
    for split in ("train", "val", "test"):
        data[split].data_root = str(ade20k)
    return data


@pytest.fixture(scope="module")
def training(data):
    return build_datasets(data.train, "data.train")


def batches(dataset, count, *, workers=0, seed=0, **sampler):
    return list(
        islice(
            training_batches(
                dataset,
                GlobalBatchSampler(len(dataset), sampler.pop("micro_batch", 2), **sampler),
                workers=workers,
                seed=seed,
                device=CPU,
            ),
            count,
        )
    )


def test_a_batch_is_what_mmsegs_segmentors_take(training):
    batch = batches(training, 1)[0]
    assert batch.inputs["img"].shape == (2, 3, 112, 112) and batch.inputs["img"].dtype == torch.float32
    assert (
        batch.inputs["gt_semantic_seg"].shape == (2, 1, 112, 112)
        and batch.inputs["gt_semantic_seg"].dtype == torch.int64
    )
    assert len(batch.files) == 2 and batch.position == 0


def test_augmented_images_are_the_same_however_many_workers_decode_them(training):
    for alone, helped in zip(batches(training, 4), batches(training, 4, workers=2)):
        assert alone.position == helped.position
        assert torch.equal(alone.inputs["img"], helped.inputs["img"])
        assert torch.equal(alone.inputs["gt_semantic_seg"], helped.inputs["gt_semantic_seg"])


def test_a_resumed_stream_augments_as_the_unbroken_one_did(training):
    unbroken, resumed = batches(training, 5), batches(training, 2, start=6)
    assert all(torch.equal(a.inputs["img"], b.inputs["img"]) for a, b in zip(unbroken[3:], resumed))


def test_two_ranks_see_the_images_of_one(training):
    whole = batches(training, 1, micro_batch=4)[0].inputs["img"]
    parts = [batches(training, 1, rank=rank, world_size=2)[0].inputs["img"] for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_the_same_image_is_augmented_anew_in_the_next_epoch(training):
    stream = batches(training, 23)  # two epochs of 23 images
    by_file = {}
    for batch in stream:
        for file, image in zip(batch.files, batch.inputs["img"]):
            by_file.setdefault(file, []).append(image)
    assert all(len(images) == 2 and not torch.equal(*images) for images in by_file.values())


def test_ranks_share_the_validation_images_between_them(data):
    dataset = build_datasets(data.val, "data.val", test_mode=True)
    dealt = [
        [image.index for image in evaluation_images(dataset, rank=rank, world_size=3, workers=0, device=CPU)]
        for rank in range(3)
    ]
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]


def test_more_ranks_than_images_leaves_some_without_any(data):
    dataset = build_datasets(data.val, "data.val", test_mode=True)
    assert list(evaluation_images(dataset, rank=8, world_size=9, workers=1, device=CPU)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"img_dir": "nowhere"},
            "there is no folder .*ade/nowhere .data_root = '.*ade' is there, img_dir = 'nowhere' under it is not: "
            r"it holds .*annotations, images\); set data\.train\.img_dir, or",
        ),
        ({"ann_dir": "/nowhere"}, r"no folder /nowhere \(ann_dir = .*set data\.train\.ann_dir$"),
        (
            {"data_root": "/nowhere"},
            r"no folder /nowhere/images/training .*data_root = '/nowhere'\), for there is no folder '/nowhere' "
            r"either; .*set data\.train\.data_root$",
        ),
        ({"img_dir": ["images/training", "elsewhere"]}, "there is no folder .*elsewhere"),
        ({"split": "few.txt"}, r"few\.txt"),
        ({"pipeline": [{"type": "RandomFlip", "prob": 1.5}]}, "AssertionError"),
        ({"type": "NoDataset"}, "NoDataset"),
        ({"typo": 1}, "typo"),
    ],
)
def test_data_that_is_not_there_is_one_sentence(data, change, words):
    entry = Config({**data.train, **change})._cfg_dict
    with pytest.raises(DataError, match=words):
        build_datasets(entry, "data.train")


def test_folders_in_a_list_are_joined_as_mmseg_joins_them(data):
    entry = Config(
        {
            **data.train,
            "img_dir": ["images/training", "images/validation"],
            "ann_dir": ["annotations/training", "annotations/validation"],
        }
    )._cfg_dict
    assert len(build_datasets(entry, "data.train")) == 23 + 7


def test_an_image_that_a_resize_would_leave_no_pixel_of_is_told_so(data, ade20k, tmp_path):
    shutil.copytree(ade20k, tmp_path / "ade")
    image, labels = (
        sorted((tmp_path / "ade" / kind / "training").iterdir())[0] for kind in ("images", "annotations")
    )
    for path in (image, labels):
        cv2.imwrite(str(path), np.zeros((1, 200), np.uint8))
    steps = [*data.train.pipeline[:2], {"type": "Resize", "img_scale": (96, 72)}, *data.train.pipeline[3:]]
    entry = Config({**data.train, "data_root": str(tmp_path / "ade"), "pipeline": steps})._cfg_dict
    dataset = build_datasets(entry, "data.train")
    with pytest.raises(
        DataError,
        match=rf"{image.name} of 1 x 200 pixels.*resized",
    ):
        first_sample(dataset, "data.train")


@DATASETS.register_module()
class NeedsAPackage(CustomDataset):
    def load_annotations(self, *args, **kwargs):
        import no_such_package_of_anybody  # noqa: F401


@DATASETS.register_module()
class ReadsLinesThatAreTooShort(CustomDataset):
    def load_annotations(self, *args, **kwargs):
        return [dict(filename=["a", "b"][5])]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NeedsAPackage", "ModuleNotFoundError: NeedsAPackage: No module named 'no_such_package_of_anybody'"),
        ("ReadsLinesThatAreTooShort", "IndexError: ReadsLinesThatAreTooShort: list index out of range"),
    ],
)
def test_a_data_set_of_ones_own_that_cannot_be_built_is_one_sentence(data, kind, words):
    entry = Config({**data.train, "type": kind})._cfg_dict
    with pytest.raises(DataError, match=f"data.train cannot be built: {words}"):
        build_datasets(entry, "data.train")


def test_a_pipeline_that_fails_on_an_image_is_one_sentence(data):
    entry = Config({**data.train, "pipeline": data.train.pipeline[:3]})._cfg_dict
    entry.pipeline.append({"type": "Collect", "keys": ["gt_depth"], "meta_keys": []})
    with pytest.raises(DataError, match=r"data\.train:.*\.jpg: KeyError: 'gt_depth'"):
        first_sample(build_datasets(entry, "data.train"), "data.train")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_named_and_the_rest_goes_on(workers, data, ade20k, tmp_path):
    shutil.copytree(ade20k, tmp_path / "ade")
    images, labels = (
        sorted((tmp_path / "ade" / kind / "validation").iterdir()) for kind in ("images", "annotations")
    )
    images[3].write_bytes(b"")
    labels[4].write_bytes(b"no image")
    cv2.imwrite(str(labels[5]), cv2.imread(str(labels[5]), cv2.IMREAD_UNCHANGED)[:, 1:])
    entry = Config({**data.val, "data_root": str(tmp_path / "ade")})._cfg_dict
    dataset = build_datasets(entry, "data.val", test_mode=True)
    found = list(evaluation_images(dataset, rank=0, world_size=1, workers=workers, device=CPU))
    assert [image.index for image in found] == list(range(7))
    for image in found:
        assert (image.fault is None) == (image.index not in (3, 4, 5)) and "Traceback" not in str(image.fault)
        if image.fault is None:
            assert tuple(image.truth.shape) == image.inputs["img_metas"][0][0]["ori_shape"][:2]
    for image, file in zip(found[3:6], (images[3], labels[4], labels[5])):
        assert file.name in image.fault
    assert re.search(r"\d+ x \d+ pixels .*label map .* \d+ x \d+", found[5].fault)


def test_the_ground_truth_is_what_mmsegs_metrics_read(data):
    dataset = build_datasets(data.val, "data.val", test_mode=True)
    for image in evaluation_images(dataset, rank=0, world_size=1, workers=0, device=CPU):
        raw = torch.from_numpy(
            cv2.imread(
                f"{dataset.ann_dir}/{dataset.img_infos[image.index]['ann']['seg_map']}", cv2.IMREAD_UNCHANGED
            )
        ).int()
        assert torch.equal(image.truth.int(), torch.where(raw == 0, 255, raw - 1)) and (raw == 0).any()


def test_missing_label_maps_are_counted_before_the_run(data, ade20k, tmp_path):
    shutil.copytree(ade20k, tmp_path / "ade")
    for path in sorted((tmp_path / "ade/annotations/training").iterdir())[5:]:
        path.unlink()
    entry = Config({**data.train, "data_root": str(tmp_path / "ade")})._cfg_dict
    with pytest.raises(DataError, match=r"data\.train: 18 of 23 label maps"):
        build_datasets(entry, "data.train")


def test_an_empty_data_set_says_which_images_it_looked_for(data, tmp_path):
    entry = Config({**data.train, "data_root": str(tmp_path)})._cfg_dict
    for folder in (entry.img_dir, entry.ann_dir):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=r"data\.train is empty.*images/training"):
        build_datasets(entry, "data.train")


@pytest.fixture(scope="module")
def damaged(data, ade20k, tmp_path_factory):
    """(the training set with a truncated image, a label map of another size and one with a label that is no
    class; their names in that order)."""
    root = tmp_path_factory.mktemp("damaged") / "ade"
    shutil.copytree(ade20k, root)
    images, labels = (sorted((root / kind / "training").iterdir()) for kind in ("images", "annotations"))
    images[3].write_bytes(images[3].read_bytes()[:100])
    cv2.imwrite(str(labels[5]), cv2.imread(str(labels[5]), cv2.IMREAD_UNCHANGED)[:-7])
    wrong = cv2.imread(str(labels[8]), cv2.IMREAD_UNCHANGED)
    wrong[0, 0] = 151
    cv2.imwrite(str(labels[8]), wrong)
    entry = data.train.copy() | {"data_root": str(root)}
    return build_datasets(entry, "data.train"), (images[3].name, labels[5].name, labels[8].name)


def test_damaged_training_images_are_named_with_the_mend_and_replaced(damaged):
    dataset, names = damaged
    seen = batches(dataset, 12)  # all 23 images
    faults = sorted({fault for batch in seen for fault in batch.faults})
    assert len(faults) == 3
    for name, words in zip(
        names,
        (
            "is no picture that can be read; copy it again",
            "pixels and its image .*one class per pixel",
            "has label 151, but there are classes 1 to 150",
        ),
    ):
        assert any(re.search(f"{name}.*{words}", fault) for fault in faults), faults
    stems = tuple(name.split(".")[0] for name in names)
    assert not any(file.split("/")[-1].startswith(stems) for batch in seen for file in batch.files)


def test_what_replaces_a_damaged_image_depends_on_neither_workers_nor_ranks(damaged):
    dataset, _ = damaged
    alone, helped = batches(dataset, 6, micro_batch=4), batches(dataset, 6, micro_batch=4, workers=2)
    assert any(batch.faults for batch in alone)
    for one, other in zip(alone, helped):
        assert one.faults == other.faults and torch.equal(one.inputs["img"], other.inputs["img"])
    ranks = [batches(dataset, 6, rank=rank, world_size=2) for rank in range(2)]
    for step, one in enumerate(alone):
        assert torch.equal(
            one.inputs["img"], torch.cat([ranks[rank][step].inputs["img"] for rank in range(2)])
        )


def test_a_data_set_of_damaged_images_only_ends_the_run(data, ade20k, tmp_path):
    shutil.copytree(ade20k, tmp_path / "ade")
    for image in (tmp_path / "ade/images/training").iterdir():
        image.write_bytes(b"")
    entry = data.train.copy() | {"data_root": str(tmp_path / "ade")}
    with pytest.raises(DataError, match="20 training images"):
        batches(build_datasets(entry, "data.train"), 1)


def test_a_data_worker_ends_by_sigterm_of_its_own_process_only(training):
    """Launchers signal the workers of a run too, which is to save first; a process that ends terminates its
    workers, and waits for them."""
    before = set(psutil.Process().children())
    stream = training_batches(training, GlobalBatchSampler(len(training), 2), workers=1, seed=0, device=CPU)
    next(stream)
    (worker,) = set(psutil.Process().children()) - before
    for number in (signal.SIGTERM, signal.SIGUSR1):
        subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    for _ in range(5):
        next(stream)
    assert worker.is_running()
    worker.terminate()
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running()
    stream.close()


def stops_in_its_first_image(data: Config, note: Path) -> None:
    """A process whose one data worker runs nothing any more, as where an image hangs."""

    @PIPELINES.register_module(force=True)
    class Stop:
        def __call__(self, results):
            note.with_suffix(".new").write_text(str(os.getpid()))
            note.with_suffix(".new").rename(note)
            os.kill(os.getpid(), signal.SIGSTOP)

    entry = Config({**data.train})._cfg_dict
    dataset = build_datasets(entry, "data.train")
    dataset.pipeline.transforms.insert(0, Stop())
    batches(dataset, 1, workers=1)


def test_a_data_worker_that_hangs_ends_with_its_process(data, tmp_path):
    note = tmp_path / "worker"
    (rank,) = start_ranks(stops_in_its_first_image, 1, free_port(), data, note)
    deadline = time.monotonic() + 60
    while not note.exists():
        assert time.monotonic() < deadline and rank.is_alive()
        time.sleep(0.02)
    worker = psutil.Process(int(note.read_text()))
    rank.kill()
    _, left = psutil.wait_procs([worker], timeout=5)
    for process in left:
        process.kill()
    assert not left


def test_whatever_generator_a_transform_draws_from_a_resumed_stream_repeats_it(data):
    @PIPELINES.register_module(force=True)
    class Noise:
        def __call__(self, results):
            drawn = torch.rand(1).item() + np.random.rand() + random.random()
            results["img"] = results["img"] + np.float32(drawn)
            return results

    entry = Config({**data.train})._cfg_dict
    entry.pipeline.insert(
        [step.type for step in entry.pipeline].index("DefaultFormatBundle"), dict(type="Noise")
    )
    dataset = build_datasets(entry, "data.train")
    unbroken, resumed, helped = (
        batches(dataset, 5),
        batches(dataset, 2, start=6),
        batches(dataset, 5, workers=2),
    )
    assert all(torch.equal(a.inputs["img"], b.inputs["img"]) for a, b in zip(unbroken[3:], resumed))
    assert all(torch.equal(a.inputs["img"], b.inputs["img"]) for a, b in zip(unbroken, helped))


def test_data_workers_collect_garbage_also_where_the_training_process_does_not(data):
    @PIPELINES.register_module(force=True)
    class NotesTheCollector:
        def __call__(self, results):
            results["img"] = results["img"] * 0 + gc.isenabled()
            return results

    entry = Config({**data.train})._cfg_dict
    steps = [step.type for step in entry.pipeline]
    entry.pipeline.insert(steps.index("DefaultFormatBundle"), dict(type="NotesTheCollector"))
    dataset = build_datasets(entry, "data.train")
    gc.disable()
    try:
        own, workers = (batches(dataset, 1, workers=count)[0].inputs["img"] for count in (0, 1))
    finally:
        gc.enable()
    assert not own.any() and workers.all()
