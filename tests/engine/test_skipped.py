"""Steps that are not finite: left out as if they had never been, but for the schedule of the data; too many end the run."""

import json
import math
from pathlib import Path

import torch
from mmcv import Config
from mmseg.datasets.builder import PIPELINES

from internseg_ds.engine.segmentor_engine import SegmentorEngine
from internseg_ds.engine.skipped import poisoned
from tests.conftest import ROOT, TINY
from tests.distributed.ranks import spawn

STEPS = 6


@PIPELINES.register_module()
class SpoilOneImage:
    """A training image whose pixels are NaN."""

    def __call__(self, results):
        if results["ori_filename"] == "ADE_train_00000007.jpg":
            results["img"] = results["img"] * math.nan
        return results


def experiment(root: Path, **engine) -> Config:
    cfg = Config.fromfile(ROOT / TINY)
    cfg.merge_from_dict({"model.backbone.embed_dim": 32, "model.backbone.num_heads": 2, "model.decode_head.in_channels": [32] * 4, "model.decode_head.channels": 16,
                         "model.auxiliary_head.in_channels": 32, "model.auxiliary_head.channels": 16, "data.samples_per_gpu": 2, "data.workers_per_gpu": 0,
                         "engine": {"global_batch": 4, **engine}, "log_config.interval": 1, "runner.max_iters": STEPS, "checkpoint_config.interval": 0})
    for split in ("train", "val", "test"):
        cfg.data[split].data_root = str(root)
    names = [step["type"] for step in cfg.data.train.pipeline]
    cfg.data.train.pipeline.insert(names.index("Normalize") + 1, dict(type="SpoilOneImage"))
    return cfg


def one_bad_image_costs_its_steps_and_nothing_else(root: Path, folder: Path) -> None:
    for ds_config in ("zero3_bf16.json", "zero1_bf16.json", "zero3_autocast.json"):
        one_bad_image(root, folder / ds_config, ds_config)


def one_bad_image(root: Path, work_dir: Path, ds_config: str) -> None:
    with SegmentorEngine(experiment(root), ROOT / "ds_configs" / ds_config, work_dir=work_dir, validate=False) as engine:
        engine.train()
        skipped = engine.deepspeed.skipped_steps
        assert 1 <= skipped < STEPS
        assert all(buffer.isfinite().all() for buffer in engine.deepspeed.module.buffers())
        assert all(master.isfinite().all() for master in engine_masters(engine))
        if engine.world.is_main:
            notes = [json.loads(line) for line in (work_dir / "skipped_steps.jsonl").read_text().splitlines()]
            assert len(notes) == skipped
            for note in notes:
                bad = [micro_batch for rank in note["ranks"] for micro_batch in rank if micro_batch["loss"] == "nan"]  # of both ranks, through batch norm
                assert any("ADE_train_00000007" in image for micro_batch in bad for image in micro_batch["images"])
            records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
            assert records[-1]["skipped_steps"] == skipped
            assert [record["step"] for record in records if record["loss"] is None] == [note["step"] for note in notes]


def engine_masters(engine):
    from internseg_ds.distributed.partitions import partitions

    return [master.data for master in partitions(engine.deepspeed)]


def test_one_bad_image_costs_its_steps_and_nothing_else(ade20k, tmp_path):
    spawn(one_bad_image_costs_its_steps_and_nothing_else, 2, ade20k, tmp_path)


def test_a_loss_that_is_not_finite_spoils_every_gradient_and_one_that_is_none():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = weight[0] * 3 + torch.tensor(math.inf)  # a constant: the gradient alone would be finite
    assert loss.isinf()
    poisoned(loss).backward()
    assert weight.grad[0].isnan()
    weight.grad = None
    finite = (weight * 3).sum()
    assert poisoned(finite) == finite
    poisoned(finite).backward()
    assert torch.equal(weight.grad, torch.tensor([3.0, 3.0]))
