"""`engine.tune` as a config writes it."""

import json

import pytest
from mmcv import ConfigDict

from internseg_ds.config.engine_options import EngineOptions, read_options
from internseg_ds.config.tuning_options import described, read_tuning
from internseg_ds.errors import ConfigError
from internseg_ds.models.lora import Lora
from internseg_ds.models.tuning import LastBlocks


@pytest.mark.parametrize(
    ("value", "mode"),
    [
        ("all", "all"),
        ("head", "head"),
        (dict(last_blocks=8), LastBlocks(8)),
        (dict(lora=dict(rank=16)), Lora(16, alpha=32.0)),
        (
            ConfigDict(lora=dict(rank=4, alpha=4, dropout=0.1, targets=["qkv", "proj"])),
            Lora(4, alpha=4.0, dropout=0.1, targets=("qkv", "proj")),
        ),
    ],
)
def test_what_a_config_may_write_and_what_a_save_notes_read_the_same(value, mode):
    options = read_options({"tune": value}, "config.py")
    assert options.tune == mode
    assert read_tuning(json.loads(json.dumps(described(mode)))) == mode


def test_everything_trains_unless_a_config_says_otherwise():
    assert EngineOptions().tune == "all"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("heads", 'must be one of "all", "head"'),
        (None, "must be one of"),
        (8, "must be one of"),
        ({}, "must be one of"),
        (dict(last_blocks=1, lora=dict(rank=1)), "must be one of"),
        (dict(last_block=8), "did you mean 'last_blocks'"),
        (dict(last_blocks=0), "last_blocks=0 must be a whole number, at least 1"),
        (dict(last_blocks=True), "must be a whole number"),
        (dict(lora=16), "must be a dict with a rank"),
        (dict(lora=dict(alpha=16)), "must be a dict with a rank"),
        (dict(lora=dict(rank=0)), "rank=0 must be a whole number, at least 1"),
        (dict(lora=dict(rank=8.0)), "rank=8.0 must be a whole number"),
        (dict(lora=dict(rank=8, aplha=1)), "did you mean 'alpha'"),
        (dict(lora=dict(rank=8, alpha=0)), "alpha=0 must be a number above 0"),
        (dict(lora=dict(rank=8, dropout=1)), "dropout=1 must be a number from 0 to below 1"),
        (dict(lora=dict(rank=8, targets="qkv")), "targets='qkv' must be a list"),
        (dict(lora=dict(rank=8, targets=[])), r"targets=\[\] must be a list"),
    ],
)
def test_what_cannot_be_meant_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        EngineOptions(tune=value)
