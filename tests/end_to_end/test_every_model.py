"""Every backbone and decode head of mmseg's registry trains and is evaluated as it is: the most telling ones
here, all of them in `make test-slow`."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.every_model.backbones import BACKBONES
from tests.end_to_end.every_model.cases import CASES, NOT_RUN, table
from tests.end_to_end.every_model.heads import HEADS
from tests.end_to_end.every_model.runs import sweep

TELLING = [
    "setting ResNet, frozen_stages",
    "backbone SwinTransformer",
    "head DAHead",
    "head PointHead",
    "head IterativeDecodeHead",
]
"""First blocks that do not train, fp32 among bf16, a parameter without dimensions, a cascade, and a head
without a threshold."""
SUPPORTED = ROOT / "docs/supported_models.md"


@pytest.fixture(scope="module")
def telling(ade20k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sweep(TELLING, ade20k, tmp_path_factory.mktemp("telling"))


@pytest.mark.slow
@pytest.mark.parametrize("case", TELLING)
def test_models_that_once_crashed_train_and_are_evaluated_under_zero3(telling, case):
    assert telling[case] == ""


@pytest.fixture(scope="module")
def everything(ade20k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return sweep(list(CASES), ade20k, tmp_path_factory.mktemp("everything"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_model_trains_and_is_evaluated_under_zero3(everything, case):
    assert everything[case] == ""


@pytest.mark.slow
def test_the_table_of_supported_models_is_what_came_out(everything):
    assert SUPPORTED.read_text().endswith(table(everything)), (
        "python docs/tabulate_supported_models.py writes it anew"
    )


def test_all_of_mmsegs_backbones_and_heads_are_tried_and_in_the_table():
    import mmseg.models.backbones
    import mmseg.models.decode_heads

    known = {
        name for module in (mmseg.models.backbones, mmseg.models.decode_heads) for name in module.__all__
    } - NOT_RUN.keys()
    assert known <= BACKBONES.keys() | HEADS.keys()
    text = SUPPORTED.read_text()
    assert all(f"| {part} | `{name}` |" in text for part, name in (case.split(" ", 1) for case in CASES))
