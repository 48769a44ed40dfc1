"""Which optimizers work on ZeRO's flat pieces, and that their state is found, saved and cut anew."""

import copy
import inspect
from pathlib import Path

import deepspeed
import pytest
import timm.optim
import torch

from internseg_ds.checkpoints.zero_checkpoint import ZeroCheckpoint
from internseg_ds.config.ds_config import resolve_ds_config
from internseg_ds.config.lr_schedule import LrSchedule
from internseg_ds.errors import ConfigError
from internseg_ds.optimization.optimizer_state import optimizer_state
from internseg_ds.optimization.optimizers import build_optimizer, kept_state
from internseg_ds.optimization.restore import restore
from tests.distributed.ranks import spawn

LR = 1e-2


@pytest.mark.parametrize(
    ("section", "moments", "counts"),
    [
        (dict(type="AdamW", lr=LR), ["exp_avg", "exp_avg_sq"], ["step"]),
        (dict(type="Adam", lr=LR, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"], ["step"]),
        (dict(type="SGD", lr=LR), [], []),
        (dict(type="SGD", lr=LR, momentum=0.9), ["momentum_buffer"], []),
        (dict(type="Lion", lr=LR), ["exp_avg"], []),
        (dict(type="Muon", lr=LR), ["exp_avg", "exp_avg_sq", "momentum_buffer"], ["step"]),
        (dict(type="timm.optim.NAdamW", lr=LR), ["exp_avg", "exp_avg_sq"], ["step"]),
        (dict(type="RMSprop", lr=LR, momentum=0.9), ["square_avg", "momentum_buffer"], ["step"]),
    ],
    ids=str,
)
def test_the_state_of_each_element_and_the_counts_are_told_apart(section, moments, counts):
    state = kept_state(section)
    assert (sorted(state.moments), sorted(state.counts)) == (sorted(moments), sorted(counts))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (dict(type="Lamb", lr=LR), "looks at tensors as a whole"),
        (dict(type="timm.optim.AdamP", lr=LR), "looks at tensors as a whole"),
        (dict(type="timm.optim.SGDP", lr=1e-9), "looks at tensors as a whole"),
        (dict(type="timm.optim.Adopt", lr=LR, caution=True), "looks at tensors as a whole"),
        (dict(type="Adafactor", lr=LR), "looks at tensors as a whole"),
        (dict(type="torch.optim.Muon", lr=LR), "looks at tensors as a whole"),
        (dict(type="Adan", lr=LR), "keeps 'step' beside the settings"),
        (dict(type="timm.optim.LaProp", lr=LR), "follows the learning rate of each group"),
        (dict(type="ASGD", lr=LR), "follows the learning rate of each group"),
        (dict(type=".optim.AdamW", lr=LR), "cannot be imported"),
        (dict(type="torch.nn.Linear", lr=LR), "is no optimizer"),
        (dict(type="LBFGS", lr=LR), "closure"),
        (dict(type="SparseAdam", lr=LR), "gradients alone"),
        (dict(type="Adamw", lr=LR), "did you mean 'AdamW'"),
        (dict(type="nowhere.optim.Lion", lr=LR), "cannot be imported"),
    ],
    ids=str,
)
def test_an_optimizer_that_cannot_work_on_pieces_is_an_error(section, words):
    with pytest.raises(ConfigError, match=words):
        kept_state(section)


WORK_ON_PIECES = {
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
    *("AdaBelief", "AdamWLegacy", "Adopt", "Lion", "MADGRAD", "NAdamLegacy", "NAdamW", "RAdamLegacy"),
    *("RMSpropTF", "SGDW"),
}
"""Of torch and timm, as updates in fp64 of whole tensors and of their pieces say; cautious, none of them does."""


def works(kind: type[torch.optim.Optimizer], **option: bool) -> bool:
    takes = inspect.signature(kind).parameters
    settings = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.05}
    try:
        optimizer_state(kind, {name: settings[name] for name in settings if name in takes} | option)
    except ConfigError:
        return False
    return True


def test_which_optimizers_of_torch_and_timm_work_on_pieces():
    of_torch = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    of_timm = [timm.optim.get_optimizer_info(name).opt_class for name in timm.optim.list_optimizers()]
    kinds = {kind for kind in (*of_torch, *of_timm) if isinstance(kind, type)}
    kinds -= {
        torch.optim.Optimizer,
        *(kind for kind in kinds if kind.__name__ == "Kron"),
    }  # which takes seconds
    found = {(kind.__module__.partition(".")[0], kind.__name__) for kind in kinds if works(kind)}
    assert {name for _, name in found} == WORK_ON_PIECES and len(found) == len(WORK_ON_PIECES)
    cautious = {kind for kind in kinds if "caution" in inspect.signature(kind).parameters}
    assert len(cautious) > 8 and not any(works(kind, caution=True) for kind in cautious)


def steps_of(
    model: torch.nn.Module, section: dict, start: int, stop: int, folder: Path | None, stage: int
) -> None:
    """Trains `model` under ZeRO from step `start`, whose state is in `folder`, to `stop`, and saves there."""
    ds = resolve_ds_config(
        {"zero_optimization": {"stage": stage}},
        experiment="",
        micro_batch=1,
        world_size=torch.distributed.get_world_size(),
        optimizer=section,
    )
    groups = [{"params": list(model.parameters()), "lr": section["lr"], "weight_decay": 0.0}]
    schedule = LrSchedule(100, "fixed")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(groups, section, ds),
        lr_scheduler=schedule.scheduler,
        config=ds.raw,
    )
    if start:
        restore(engine, ZeroCheckpoint.open(folder), schedule)
    for step in range(start, stop):
        torch.manual_seed(step)
        engine.backward(engine(torch.randn(3, 5)).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder), tag=f"global_step{stop}")
    torch.distributed.barrier()


SECTIONS = [
    dict(type="SGD", lr=LR, momentum=0.9),
    dict(type="Lion", lr=LR),
    dict(type="NAdam", lr=LR),
]


def halves(folder: Path, stages: tuple[int, int], part: int) -> None:
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 7)
    for section in SECTIONS:
        at = folder / section["type"]
        start, stop = ((0, 3), (3, 6))[part]
        engine_model = copy.deepcopy(model)
        if part:
            saved = ZeroCheckpoint.open(at)
            with torch.no_grad():
                for name, param in engine_model.named_parameters():
                    param.copy_(saved.read(name))
        steps_of(engine_model, section, start, stop, at, stages[part])


@pytest.mark.parametrize("stages", [(1, 3), pytest.param((3, 2), marks=pytest.mark.slow)])
def test_a_run_goes_on_under_another_stage_and_size_as_plain_pytorch_would(stages, tmp_path):
    spawn(halves, 2, tmp_path, stages, 0)
    spawn(halves, 3, tmp_path, stages, 1)
    for section in SECTIONS:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 7)
        kind = section["type"]
        settings = {key: value for key, value in section.items() if key != "type"}
        if kind == "Lion":
            from timm.optim import Lion as of_kind
        else:
            of_kind = getattr(torch.optim, kind)
        optimizer = of_kind(model.parameters(), **settings)
        for step in range(6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(3, 5)).square().mean().backward()
            optimizer.step()
        saved = ZeroCheckpoint.open(tmp_path / kind)
        for name, param in model.named_parameters():
            torch.testing.assert_close(saved.read(name), param.detach(), rtol=1e-5, atol=1e-6)
