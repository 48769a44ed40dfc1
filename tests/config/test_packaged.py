"""Configs and ds_configs that come with the package are found by name, from any folder; a user's file goes first."""

import re

import pytest

from internseg_ds.config.config_file import load_config
from internseg_ds.config.ds_config_file import read_ds_config
from internseg_ds.config.packaged import CONFIGS, DS_CONFIGS, find
from internseg_ds.errors import ConfigError
from tests.conftest import ROOT, TINY

NAME = TINY.removeprefix("configs/")


@pytest.mark.parametrize(
    "given", [NAME, NAME.removesuffix(".py"), TINY, TINY.removesuffix(".py"), str(ROOT / TINY)]
)
def test_a_config_is_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, cfg = load_config(given)
    assert path == str(ROOT / TINY)
    assert cfg.model.decode_head.num_classes == 150  # of its bases, which are named relative to it


@pytest.mark.parametrize("given", ["zero3_bf16", "zero3_bf16.json", "ds_configs/zero3_bf16.json"])
def test_a_ds_config_is_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(given) == read_ds_config(ROOT / "ds_configs/zero3_bf16.json")


def test_a_file_that_a_user_has_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3_bf16.json").write_text('{"steps_per_print": 7}')
    assert read_ds_config("zero3_bf16")[1] == {"steps_per_print": 7}
    assert read_ds_config("ds_configs/zero3_bf16")[1] != {"steps_per_print": 7}
    mine = tmp_path / NAME
    mine.parent.mkdir()
    mine.write_text("model = dict()\n")
    assert find(NAME, CONFIGS) == find(NAME.removesuffix(".py"), CONFIGS) == mine.relative_to(tmp_path)


def test_a_name_never_leads_out_of_our_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    assert not find("../setup.py", CONFIGS).is_file()
    assert not find("/zero3_bf16.json", DS_CONFIGS).is_file()


@pytest.mark.parametrize(
    ("given", "near"),
    [
        (NAME.replace("tiny_112", "tny_112"), NAME),
        (NAME.rpartition("/")[2].removesuffix(".py"), NAME),  # without its folder
    ],
)
def test_a_near_miss_of_a_config_is_answered_with_its_name(given, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"there is no config file {given}; did you mean {near}?"):
        load_config(given)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=f"did you mean {TINY}?"):
        load_config(given)


def test_a_near_miss_of_a_ds_config_is_answered_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no ds_config zero3_fb16; did you mean zero3_bf16\.json"):
        read_ds_config("zero3_fb16")
    with pytest.raises(ConfigError, match=f"nor in {ROOT}/ds_configs, where ours are"):
        read_ds_config("something/else.json")


def test_a_config_of_ones_own_inherits_from_one_of_ours_as_the_page_says(tmp_path, monkeypatch):
    page = (ROOT / "docs/installing.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    cfg = load_config("mine")[1]
    assert cfg.data.samples_per_gpu == 4
    assert cfg.model.decode_head.num_classes == 150
