"""Steps that are not finite: left out as if they had never been, but for the schedule of the data; too many
end the run."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmseg.datasets.builder import PIPELINES

from internseg_ds.errors import Diverged
from internseg_ds.training.nonfinite_steps import nan_gradients_unless_finite
from internseg_ds.training.segmentor_engine import SegmentorEngine
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

STEPS = 6


@PIPELINES.register_module()
class SpoilOneImage:
    """A training image whose pixels are NaN."""

    def __call__(self, results):
        if results["ori_filename"] == "ADE_train_00000007.jpg":
            results["img"] = results["img"] * math.nan
        return results


@PIPELINES.register_module()
class SpoilAllImages:
    """The same of every image."""

    def __call__(self, results):
        results["img"] = results["img"] * math.nan
        return results


def one_bad_image_costs_its_steps_and_nothing_else(root: Path, folder: Path) -> None:
    for ds_config in ("zero3_bf16.json", "zero1_bf16.json", "zero3_autocast.json"):
        one_bad_image(root, folder / ds_config, ds_config)
    nothing_but_bad_images(root, folder / "all")


def one_bad_image(root: Path, work_dir: Path, ds_config: str) -> None:
    cfg = small_experiment(root, f"runner.max_iters={STEPS}", after_normalize="SpoilOneImage")
    with SegmentorEngine(cfg, ROOT / "ds_configs" / ds_config, work_dir=work_dir, validate=False) as engine:
        engine.train()
        skipped = engine.deepspeed.skipped_steps
        assert 1 <= skipped < STEPS
        assert all(buffer.isfinite().all() for buffer in engine.deepspeed.module.buffers())
        assert all(master.isfinite().all() for master in engine_masters(engine))
        if engine.world.is_main:
            notes = [json.loads(line) for line in (work_dir / "skipped_steps.jsonl").read_text().splitlines()]
            assert len(notes) == skipped
            for note in notes:
                # of both ranks, through batch norm
                bad = [
                    micro_batch
                    for rank in note["ranks"]
                    for micro_batch in rank
                    if micro_batch["loss"] == "nan"
                ]
                assert any(
                    "ADE_train_00000007" in image for micro_batch in bad for image in micro_batch["images"]
                )
            records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
            assert records[-1]["skipped_steps"] == skipped
            assert [record["step"] for record in records if record["loss"] is None] == [
                note["step"] for note in notes
            ]


def nothing_but_bad_images(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(root, "runner.max_iters=2", after_normalize="SpoilAllImages")
    with (
        SegmentorEngine(
            cfg, ROOT / "ds_configs/zero1_bf16.json", work_dir=work_dir, validate=False
        ) as engine,
        pytest.raises(Diverged, match=r"every step.*\(2\)"),
    ):
        engine.train()
    assert not list(work_dir.glob("checkpoints/*"))  # or a run that goes on from there would be done


def engine_masters(engine):
    from internseg_ds.distributed.zero_internals import fp32_partitions

    return [master.data for master in fp32_partitions(engine.deepspeed)]


def test_one_bad_image_costs_its_steps_and_nothing_else_and_only_bad_ones_are_an_error(ade20k, tmp_path):
    spawn(one_bad_image_costs_its_steps_and_nothing_else, 2, ade20k, tmp_path)


def test_a_loss_that_is_not_finite_spoils_every_gradient_and_one_that_is_none():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = weight[0] * 3 + torch.tensor(math.inf)  # a constant: the gradient alone would be finite
    assert loss.isinf()
    nan_gradients_unless_finite(loss).backward()
    assert weight.grad[0].isnan()  # the other has no part in it
    weight.grad = None
    finite = (weight * 3).sum()
    assert nan_gradients_unless_finite(finite) == finite
    nan_gradients_unless_finite(finite).backward()
    assert torch.equal(weight.grad, torch.tensor([3.0, 3.0]))
