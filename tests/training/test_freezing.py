"""`engine.freeze`, and several engines in one process."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmseg.models.builder import BACKBONES

from internseg_ds import SegmentorEngine
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.initial_values import gathered
from internseg_ds.errors import ConfigError
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.preflight.model_checks import check_classes
from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.end_to_end.every_model.heads import HEADS
from tests.small_experiment import small_experiment

ZERO3 = ROOT / "ds_configs/zero3_bf16.json"
FREEZE = "engine.freeze=[backbone.patch_embed,backbone.blocks.0,backbone.pos_embed]"


def trains_all_but(root: Path, work_dir: Path) -> None:
    cfg = small_experiment(
        root, "runner.max_iters=2", "lr_config.warmup_iters=0", "engine.global_batch=4", FREEZE
    )
    with SegmentorEngine(cfg, ZERO3, work_dir=work_dir, validate=False) as engine:
        params, values = dict(engine.deepspeed.module.named_parameters()), []
        for _ in range(2):
            with gathered(list(params.values())):
                values.append({name: param.detach().clone() for name, param in params.items()})
            if len(values) == 1:
                engine.train()
    before, after = values
    frozen = {name for name, param in params.items() if not param.requires_grad}
    named = ("backbone.patch_embed.", "backbone.blocks.0.", "backbone.pos_embed")
    assert frozen == {name for name in params if name.startswith(named)}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(
        before["backbone.blocks.1.mlp.fc1.weight"], after["backbone.blocks.1.mlp.fc1.weight"]
    )


def test_parts_that_engine_freeze_names_do_not_train_and_all_others_do(ade20k, tmp_path):
    spawn(trains_all_but, 2, ade20k, tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            "[backbone.block.0]",
            r"engine.freeze=\['backbone.block.0'\] cannot be: .* no part 'backbone.block.0'; did you mean "
            r"'backbone.blocks.0'",
        ),
        ("backbone", "engine.freeze='backbone' must be a list of names of modules and parameters"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_before_anything_is_built(value, words, ade20k, tmp_path):
    with pytest.raises(ConfigError, match=words):
        SegmentorEngine(
            small_experiment(ade20k, f"engine.freeze={value}"), ZERO3, work_dir=tmp_path, validate=False
        )


class Fails(InternViT6B):
    """On a device, while ZeRO-3 builds it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        if self.fails and not self.pos_embed.is_meta:
            raise RuntimeError("no room")


def one_engine_after_the_other(root: Path, work_dir: Path) -> None:
    torch.distributed.destroy_process_group()  # each engine makes its own, as in a notebook
    BACKBONES.register_module(Fails, force=True)
    cfg = small_experiment(root, "runner.max_iters=1", "model.backbone.type=Fails", "engine.global_batch=2")
    for attempt, fails in enumerate((True, False, False)):
        Fails.fails = fails
        try:
            with SegmentorEngine(cfg, ZERO3, work_dir=work_dir / str(attempt), validate=False) as engine:
                assert engine.train().step == 1
        except RuntimeError as error:
            assert fails and "no room" in str(error), error
        else:
            assert not fails
    torch.distributed.init_process_group("gloo")


def test_an_engine_starts_after_one_that_failed_while_it_was_built_and_after_one_that_was_closed(
    ade20k, tmp_path
):
    spawn(one_engine_after_the_other, 1, ade20k, tmp_path)


def test_an_auxiliary_head_with_labels_of_its_own_may_count_other_classes_than_the_data_set():
    model, names = build_on_meta(HEADS["STDCHead"]), list(range(150))
    # the edges that STDCHead learns are 2 classes
    check_classes(model, SimpleNamespace(CLASSES=names, PALETTE=names), "data.train")
    model.auxiliary_head[0].num_classes = 2
    with pytest.raises(ConfigError, match="FCNHead predicts num_classes=2"):
        check_classes(model, SimpleNamespace(CLASSES=names, PALETTE=names), "data.train")
