"""All families at their full size on tensors that have no storage and pretend to lie on a GPU: devices,
dtypes, and where the host would wait."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from internseg_ds.config.experiment import read_experiment
from internseg_ds.distributed.batch_norms import AnyDeviceSyncBatchNorm
from internseg_ds.distributed.construction import build_on_meta, set_activation_checkpointing
from internseg_ds.distributed.gathering import Forwards, copy_fits
from internseg_ds.distributed.precision import apply_precision
from internseg_ds.distributed.process_group import AnyRankFlags
from internseg_ds.distributed.zero_internals import orthogonalized
from internseg_ds.monitoring.step_metrics import StepMetrics
from internseg_ds.optimization.matrix_exchange import Matrix, MatrixExchange, Part
from internseg_ds.planning.image_sizes import crop_size
from internseg_ds.training.nonfinite_steps import nan_gradients_unless_finite
from tests.conftest import ROOT
from tests.waits import Waits, fake_gpu

VIT, IMAGE = "configs/intern_vit_6b", "configs/intern_image/ade20k"
FULL = f"{VIT}/full_tuning/upernet_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5.py"
MASK2FORMER_H = f"{IMAGE}/mask2former_internimage_h_896_80k_cocostuff2ade20k_ss.py"
FAMILIES = [
    FULL,
    f"{VIT}/few_shot/linear_intern_vit_6b_504_5k_ade20k_bs16_lr4e-5_1of16.py",
    f"{VIT}/linear_probing/linear_intern_vit_6b_504_80k_ade20k_bs16_lr4e-5_frozen.py",
    f"{IMAGE}/upernet_internimage_t_512_160k_ade20k.py",
    f"{IMAGE}/upernet_internimage_h_896_160k_ade20k.py",
    MASK2FORMER_H,
]
MASKS = 11
EXPECTED = {MASK2FORMER_H: {("to host", "mask_matching.py:match"): 1}}
"""Costs of all layers and images at once, for scipy to assign queries to masks."""


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    """A process group whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def segmentor_on(device: str, config: str, heads: torch.dtype = torch.float32):
    """(the segmentor in the dtypes that it trains in, inputs of a micro-batch of 2 images), inside a
    FakeTensorMode."""
    experiment = read_experiment(ROOT / config)
    height, width = crop_size(experiment)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = build_on_meta(experiment.model).to(torch.bfloat16)
    set_activation_checkpointing(model, "blocks")
    model._apply(lambda tensor: torch.empty_like(tensor, device=device))
    apply_precision(model, torch.bfloat16, heads=heads)
    meta = {name: (height, width, 3) for name in ("img_shape", "pad_shape", "ori_shape")} | {
        "filename": "",
        "scale_factor": 1.0,
        "flip": False,
    }
    inputs = {
        "img": torch.empty(2, 3, height, width, device=device),
        "img_metas": [meta] * 2,
        "gt_semantic_seg": torch.empty(2, 1, height, width, dtype=torch.int64, device=device),
    }
    if config == MASK2FORMER_H:
        inputs["gt_masks"] = [
            torch.empty(MASKS, height, width, dtype=torch.uint8, device=device) for _ in range(2)
        ]
        inputs["gt_labels"] = [torch.empty(MASKS, dtype=torch.int64, device=device) for _ in range(2)]
    return model.train(), inputs


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(value for name, value in terms.items() if "loss" in name)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda path: path.rsplit("/", 1)[1].removesuffix(".py"))
def test_a_forward_pass_stays_on_the_gpu_in_its_dtypes_and_waits_for_nothing(config):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, inputs = segmentor_on("cuda", config)
        seen = {}
        model.backbone.register_forward_hook(
            lambda _, args, features: seen.update(image=args[0], features=features)
        )
        with Waits() as waits:
            terms = model(return_loss=True, **inputs)
            loss = nan_gradients_unless_finite(total(terms))
            interval = StepMetrics()
            interval.add({**{name: value.mean() for name, value in terms.items()}, "loss": loss})
            interval.end_step(loss.detach())
    assert seen["image"].dtype == torch.bfloat16 and {feature.dtype for feature in seen["features"]} == {
        torch.float32
    }
    assert {(value.device.type, value.dtype) for value in terms.values()} == {("cuda", torch.float32)}
    assert loss.requires_grad and dict(waits.found) == EXPECTED.get(config, {})
    assert {kind for _, kind in waits.collectives} <= {"cuda"}
    norms = [module for module in model.modules() if isinstance(module, AnyDeviceSyncBatchNorm)]
    assert len(waits.collectives) >= len(norms)


def test_heads_in_bf16_wait_for_nothing_either():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, inputs = segmentor_on("cuda", FULL, heads=torch.bfloat16)
        with Waits() as waits:
            terms = model(return_loss=True, **inputs)
    assert not waits.found and {value.dtype for value in terms.values()} == {torch.float32}


@pytest.mark.parametrize("config", FAMILIES, ids=lambda path: path.rsplit("/", 1)[1].removesuffix(".py"))
def test_a_backward_pass_has_gradients_in_the_weights_dtype_and_reads_no_value(config, monkeypatch):
    """On fake CPU tensors: torch's engine asks a real driver for the streams of a GPU. A value that is read
    has no fake, which would raise."""
    from internseg_ds.models.mask2former import mask_matching

    monkeypatch.setattr(mask_matching, "linear_sum_assignment", lambda costs: (range(MASKS), range(MASKS)))
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: self)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, inputs = segmentor_on("cpu", config)
        total(model(return_loss=True, **inputs)).mean().backward()
        trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
        without = [name for name, param in trained.items() if param.grad is None]
        assert {param.grad.dtype for param in trained.values() if param.grad is not None} == {torch.bfloat16}
        assert all(param.grad.shape == param.shape for param in trained.values() if param.grad is not None)
        assert len(without) < len(trained) / 2 and not [name for name in without if ".blocks." in name], (
            without
        )


def test_what_our_own_collectives_send_lies_on_the_gpu(monkeypatch):
    monkeypatch.setattr("internseg_ds.distributed.gathering.free_memory", lambda *_: 2**30)
    monkeypatch.setattr(torch.cuda, "Event", lambda: type("Event", (), {"record": lambda self: None})())
    device = torch.device("cuda")
    with fake_gpu() as waits:
        norm = AnyDeviceSyncBatchNorm(3, device=device)
        waits.found.clear()  # its counter comes from the host
        AnyRankFlags([True, False], device)
        interval, one = StepMetrics(), torch.ones((), device=device)
        interval.add({"loss": one, "acc": one})
        interval.end_step(one)
        interval.add({"loss": one, "acc": one})
        interval.end_step(one)
        norm(torch.ones(2, 3, 4, 4, device=device))
        halves = (Part(0, 0, 0, 8), Part(1, 0, 8, 16))
        exchange = MatrixExchange([Matrix(4, 4, halves)], rank=0, world_size=2)
        exchange.replace(torch.ones(8, device=device), partial(orthogonalized, method="standard"))
        assert not waits.found
        assert Counter(name for name, _ in waits.collectives) == {
            "c10d::_allgather_base_": 2,
            "c10d::allreduce_": 1,
            "c10d::alltoall_base_": 4,
        }
        interval.means_over_ranks((1.0, 2.0))  # at a record, which waits once
        assert waits.found == {("to host", "step_metrics.py:means_over_ranks"): 1}
        assert copy_fits(1, device) is not None  # evaluations may, too
        Forwards(torch.nn.Linear(1, 1, device=device), in_step=True)._smallest_image(torch.Size((64, 48)))
    assert {kind for _, kind in waits.collectives} == {"cuda"} and len(waits.collectives) == 10


def test_there_is_no_other_collective_of_tensors_in_the_package():
    """One that comes anew belongs into the tests above. An evaluation counts where its labels are; heads
    count masks in a forward; running statistics are averaged between steps."""
    called = re.compile(
        r"\b(?:dist\.(?!all_gather_object|gather_object|broadcast_object_list)(?:all_|broadcast|reduce|gather|scatter)\w*|reduce_mean)\("
    )
    found = Counter(
        file.name for file in (ROOT / "internseg_ds").rglob("*.py") for _ in called.finditer(file.read_text())
    )
    assert found == {
        "evaluator.py": 1,
        "step_metrics.py": 1,
        "mask_losses.py": 1,
        "batch_norms.py": 3,
        "gathering.py": 2,
        "process_group.py": 1,
        "matrix_exchange.py": 1,
    }
