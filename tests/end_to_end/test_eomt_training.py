"""EoMT under the engine: it trains and is scored under ZeRO-3, and goes on where masked attention was."""

import json
from pathlib import Path

import pytest
from mmcv import Config, DictAction

from internseg_ds import SegmentorEngine
from tests.conftest import EOMT, ROOT, TRANSFORMERS, data_options
from tests.distributed.ranks import spawn
from tests.end_to_end.conftest import SMALLER

OPTIONS = [
    "runner.max_iters=6",
    "checkpoint_config.interval=3",
    "evaluation.interval=6",
    "evaluation.save_best=None",
    "lr_config.warmup_iters=2",
    "model.decode_head.num_queries=10",
    "model.train_cfg.num_points=64",
]


@pytest.fixture(scope="module")
def trained(train, fp32):
    """6 steps under ZeRO-3 in fp32 on 2 processes: masks are gone from block 3 in the third and from block 4 in
    the sixth."""
    return train("--deepspeed_config", fp32, config=EOMT, options=OPTIONS)


def test_masked_attention_goes_away_block_after_block(trained):
    shares = [record["decode.masked_share"] for record in trained.records if "loss" in record]
    assert shares == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.5, 0.0], abs=1e-6)


def test_resumed_it_has_the_losses_and_scores_of_an_unbroken_run(trained, train, fp32):
    """Which it has only if masked attention is annealed from where it was, and if partitioned weights segment
    as whole ones."""
    resumed = train(
        *("--resume", trained.work_dir / "checkpoints" / "iter_3", "--deepspeed_config", fp32),
        config=EOMT,
        options=[*OPTIONS, "engine.evaluation_weights=partitioned"],
    )
    assert sorted(trained.losses) == [1, 2, 3, 4, 5, 6] and len(set(trained.losses.values())) == 6
    assert resumed.losses == pytest.approx(
        {step: loss for step, loss in trained.losses.items() if step > 3}, rel=1e-5
    )
    assert list(trained.scores) == [6] and resumed.scores == pytest.approx(trained.scores, abs=1e-2)


def losses_under(root: Path, folder: Path, backbone: str, runs: dict[str, dict]) -> None:
    for name, ds_config in runs.items():
        cfg = Config.fromfile(ROOT / EOMT)
        if backbone == "transformers":
            cfg.model.backbone = Config.fromfile(ROOT / TRANSFORMERS).model.backbone
            cfg.model.backbone.update(out_indices=[3], final_norm=True)
        for option in (*SMALLER[EOMT], *data_options(root), *OPTIONS[4:], "engine.backbone_dtype=bfloat16"):
            key, value = option.split("=", 1)
            cfg.merge_from_dict({key: DictAction._parse_iterable(value)})
        cfg.runner.max_iters = 4
        if not ds_config.get("bf16"):
            cfg.engine.backbone_dtype = "float32"
        with SegmentorEngine(cfg, ds_config, work_dir=folder / name, saves=False, validate=False) as engine:
            engine.train()


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["timm", "transformers"])
def test_every_stage_has_the_same_losses_over_either_adapter(backbone, ade20k, tmp_path):
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    runs = {
        f"zero{stage}_{name}": {"zero_optimization": {"stage": stage}, **settings}
        for stage in (1, 2, 3)
        for name, settings in precisions.items()
    }
    spawn(losses_under, 2, ade20k, tmp_path, backbone, runs)
    losses = {
        name: [
            json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in runs
    }
    expected = losses["zero3_fp32"]
    assert len(expected) == 4 and len(set(expected)) == 4
    for name, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-5 if name.endswith("fp32") else 3e-2), name
