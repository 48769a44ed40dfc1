"""`engine.tune` in whole runs: resumed at another size and stage, merged into one file, refused where it
changes."""

import json
from pathlib import Path

import pytest
import torch
from mmcv import Config
from mmseg.models import build_backbone, build_segmentor

from internseg_ds import SegmentorEngine
from internseg_ds.checkpoints.adapter_export import export_adapters
from internseg_ds.checkpoints.checksum_files import verify
from internseg_ds.checkpoints.consolidate import consolidate
from internseg_ds.checkpoints.weights import open_weights, weights_of
from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.construction import choose_trained
from internseg_ds.distributed.process_group import World
from internseg_ds.errors import CheckpointError
from internseg_ds.evaluation.inference import load_trained
from internseg_ds.preflight.preflight import Plan, check
from internseg_ds.training.resume.find_checkpoint import compare_with_checkpoint
from tests.distributed.ranks import spawn
from tests.end_to_end.conftest import NO_NOISE
from tests.small_experiment import small_experiment

LORA = {"lora": {"rank": 3, "alpha": 12}}
CPU = torch.device("cpu")


def experiment(root: Path, tune: object = LORA, steps: int = 4) -> Config:
    cfg = small_experiment(
        root,
        *NO_NOISE,
        f"runner.max_iters={steps}",
        "lr_config.warmup_iters=0",
        "optimizer.lr=0.01",
        "checkpoint_config.interval=2",
        "evaluation.interval=4",
        "engine.ema=0.5",
        "engine.backbone_dtype=float32",
    )
    cfg.engine.tune = tune
    return cfg


def train(root: Path, work_dir: Path, stage: int, resume: Path | None, tune: object) -> None:
    cfg, ds_config = experiment(root, tune), {"zero_optimization": {"stage": stage}}
    if resume is not None:
        cfg.data.samples_per_gpu = 4
    with SegmentorEngine(cfg, ds_config, work_dir=work_dir, resume=resume, validate=resume is None) as engine:
        engine.train()


def losses(work_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def unbroken(ade20k, tmp_path_factory) -> Path:
    """4 steps of 2 processes under ZeRO-3, saved at step 2 and 4, evaluated at the end."""
    work_dir = tmp_path_factory.mktemp("lora")
    spawn(train, 2, ade20k, work_dir, 3, None, LORA)
    return work_dir


def test_a_run_with_adapters_goes_on_at_another_size_and_stage(unbroken, ade20k, tmp_path):
    spawn(train, 1, ade20k, tmp_path, 1, unbroken / "checkpoints/iter_2", LORA)
    expected = {step: loss for step, loss in losses(unbroken).items() if step > 2}
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    then, now = ZeroCheckpoint.open(unbroken), ZeroCheckpoint.open(tmp_path)
    factor = "backbone.blocks.1.mlp.fc1.lora_B.default.weight"
    for what in ("fp32", "ema"):
        values = [save.read_slice(factor, 0, save.shapes[factor].numel(), what) for save in (then, now)]
        torch.testing.assert_close(values[0], values[1], rtol=1e-2, atol=1e-4)
    trained = {name for name in then.trained if name.startswith("backbone.")}
    # the adapters, and the pyramid behind the blocks
    assert len([name for name in trained if ".lora_" in name]) == 4 * 4 * 2
    assert all(".lora_" in name or name.startswith("backbone.up") for name in trained)


@pytest.mark.parametrize("what", ["fp32", "ema"])
def test_the_merged_file_and_the_checkpoint_itself_predict_what_the_adapters_do(
    what, unbroken, ade20k, tmp_path
):
    checkpoint, cfg = ZeroCheckpoint.open(unbroken), experiment(ade20k)
    options = read_experiment(cfg).engine
    unmerged = build_segmentor(cfg.model)
    choose_trained(unmerged, options)
    raw = weights_of(checkpoint, what)
    unmerged.load_state_dict({name: raw.read(name) for name in raw.shapes})
    file = consolidate(unbroken, tmp_path / "merged.pth", ema=what == "ema")
    plain = read_experiment(experiment(ade20k, tune="all"))
    image, metas = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0)), [{}]
    with torch.no_grad():
        expected = unmerged.eval().encode_decode(image, [dict(ori_shape=(112, 112, 3), flip=False)])
        for found in (
            load_trained(plain, file, CPU),
            load_trained(plain, unbroken, CPU, ema=what == "ema"),
            load_trained(read_experiment(cfg), file, CPU),
        ):
            torch.testing.assert_close(found.encode_decode(image, metas), expected, rtol=1e-4, atol=1e-5)
        for name, param in unmerged.named_parameters():
            if ".lora_B." in name:
                param.zero_()
        assert (unmerged.encode_decode(image, metas) - expected).abs().max() > 1e-3
    state = torch.load(file, weights_only=True)["state_dict"]
    mmsegs_own = build_segmentor(plain.model)
    mmsegs_own.load_state_dict(state)  # strictly


def test_peft_reads_the_exported_adapters(unbroken, ade20k, tmp_path):
    from peft import PeftModel

    folder = export_adapters(unbroken, tmp_path / "adapters")
    assert {path.name for path in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    verify(folder)
    cfg = experiment(ade20k)
    raw = weights_of(ZeroCheckpoint.open(unbroken))
    backbone = build_backbone(cfg.model.backbone)
    base = {name.replace(".base_layer.", "."): name for name in raw.shapes if ".lora_" not in name}
    backbone.load_state_dict(
        {
            name.removeprefix("backbone."): raw.read(base[name])
            for name in base
            if name.startswith("backbone.")
        }
    )
    image = torch.randn(1, 3, 112, 112)
    merged = load_trained(read_experiment(cfg), unbroken, CPU).backbone
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(backbone.eval(), folder).eval()
        for found, expected in zip(adapted(image), merged(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError, match="a folder"):
        export_adapters(unbroken, tmp_path / "adapters.pth")


def test_slices_of_merged_weights_are_those_of_the_whole_ones(unbroken):
    merged = open_weights(unbroken)
    name = "backbone.blocks.0.attn.qkv.weight"
    whole = merged.read(name)
    raw = weights_of(ZeroCheckpoint.open(unbroken))
    layer = "backbone.blocks.0.attn.qkv"
    a, b = (raw.read(f"{layer}.lora_{factor}.default.weight").double() for factor in "AB")
    expected = raw.read(f"{layer}.base_layer.weight").double() + 4 * b @ a
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-7)
    for start, stop in ((0, 1), (5, 40), (31, 33), (64, 96), (95, whole.numel()), (7, 7)):
        part = merged.read_slice(name, start, stop)
        torch.testing.assert_close(part, whole.flatten()[start:stop], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "tune",
    [
        "all",
        "head",
        {"last_blocks": 2},
        {"lora": {"rank": 4, "alpha": 12}},
        {"lora": {"rank": 3, "alpha": 3}},
    ],
)
def test_a_run_that_would_train_other_parts_is_not_gone_on_with(tune, unbroken, ade20k):
    plan = check(
        read_experiment(experiment(ade20k, tune)),
        {"zero_optimization": {"stage": 3}},
        World(0, 1, 0),
        validate=False,
        resume_from=unbroken / "checkpoints/iter_2",
    )
    with pytest.raises(CheckpointError, match=r"engine\.tune=\{'lora'.*engine\.tune="):
        compare_with_checkpoint(plan)


def resumed_plan(tune: dict, unbroken: Path, ade20k: Path) -> Plan:
    return compare_with_checkpoint(
        check(
            read_experiment(experiment(ade20k, tune)),
            {"zero_optimization": {"stage": 3}},
            World(0, 1, 0),
            validate=False,
            resume_from=unbroken / "checkpoints/iter_2",
        )
    )


def test_the_same_layers_by_name_and_another_dropout_are_gone_on_with(unbroken, ade20k):
    targets = ["qkv", "proj", "fc1", "fc2"]  # all that there are
    plan = resumed_plan({"lora": {**LORA["lora"], "targets": targets, "dropout": 0.1}}, unbroken, ade20k)
    assert any("engine.tune.lora.dropout" in note and "0.1" in note for note in plan.notes)
    with pytest.raises(CheckpointError, match="lora_A"):
        resumed_plan({"lora": {**LORA["lora"], "targets": ["qkv"]}}, unbroken, ade20k)


def test_a_fresh_run_with_adapters_starts_from_a_whole_checkpoint_of_one(unbroken, ade20k):
    plan = check(
        read_experiment(experiment(ade20k)),
        {"zero_optimization": {"stage": 3}},
        World(0, 1, 0),
        validate=False,
        load_from=unbroken,
    )
    assert plan.weights.sources["backbone.blocks.0.attn.qkv.base_layer.weight"] == (
        "backbone.blocks.0.attn.qkv.weight"
    )
    assert not plan.weights.missing
    assert not any(".lora_" in name for name in plan.weights.sources)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["head", {"last_blocks": 2}])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_blocks_stay_and_all_else_moves(tune, stage, ade20k, tmp_path):
    spawn(train, 2, ade20k, tmp_path, stage, None, tune)
    first, last = (ZeroCheckpoint(tmp_path / "checkpoints" / name) for name in ("iter_2", "iter_4"))
    moved = {name for name in first.shapes if not torch.equal(first.read(name), last.read(name))}
    behind = ("backbone.up", "decode_head", "auxiliary_head")
    if tune != "head":
        behind += ("backbone.blocks.2.", "backbone.blocks.3.")
    assert moved == {name for name in first.shapes if name.startswith(behind)}
