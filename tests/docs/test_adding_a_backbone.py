"""docs/adding_a_backbone.md, followed: its files are written out of the page and its commands are run, each
as it stands there."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv import Config
from mmseg.models import build_segmentor

from internseg_ds.checkpoints.weights import open_weights
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.distributed.weight_loading import load, match_backbone
from internseg_ds.optimization.parameter_groups import parameter_groups
from tests.conftest import ROOT, free_port

PAGE = (ROOT / "docs/adding_a_backbone.md").read_text()
FILES = dict(
    re.findall(r"^`(mine/\w+\.py)`(?:(?!```).)*```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)
EXPORT, *COMMANDS = re.search(r"^```\n(export .*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1].splitlines()
NAME = "upernet_small_vit_112_ade20k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ade20k) -> Path:
    """The project's root as a reader of the page has it: its own folders, the data, and the files of the
    page."""
    root = tmp_path_factory.mktemp("page")
    for name in ("launch", "configs", "ds_configs"):
        (root / name).symlink_to(ROOT / name)
    (root / "data/ade").mkdir(parents=True)
    (root / "data/ade/ADEChallengeData2016").symlink_to(ade20k)
    assert FILES.keys() == {"mine/small_vit.py", f"mine/{NAME}.py"}
    (root / "mine").mkdir()
    for name, code in FILES.items():
        (root / name).write_text(code)
    return root


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """The folder after the two commands that train."""
    assert EXPORT == "export PYTHONPATH=mine"
    env = {
        **os.environ,
        "PYTHONPATH": f"mine:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_SKIP_CUDA_CHECK": "1",
    }
    for command in COMMANDS[:2]:
        done = subprocess.run(
            command.replace("deepspeed ", f"deepspeed --master_port {free_port()} "),
            shell=True,
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """run(command) -> stdout: a python command of the page, in this process, which has everything
    imported."""

    def run(command: str) -> str:
        python, script, *arguments = shlex.split(command)
        assert python == "python"
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend("mine")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        shown = capsys.readouterr()
        assert not ended.value.code, shown.err
        return shown.out

    return run


@pytest.fixture
def config(monkeypatch, folder) -> Config:
    monkeypatch.syspath_prepend(str(folder / "mine"))
    return Config.fromfile(str(folder / f"mine/{NAME}.py"))


def records(folder: Path, name: str) -> dict[int, dict]:
    lines = [
        json.loads(line) for line in (folder / "work_dirs" / name / "metrics.jsonl").read_text().splitlines()
    ]
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.mark.slow
def test_the_small_backbone_trains_under_zero_3_and_goes_on_with_another_number_of_processes(trained):
    first, again = records(trained, NAME), records(trained, "again")
    assert (list(first), list(again)) == (list(range(1, 11)), [7, 8, 9, 10])
    # the same images and noise; bf16
    assert [again[step]["loss"] for step in again] == pytest.approx(
        [first[step]["loss"] for step in again], rel=0.01
    )


def test_one_file_comes_out_of_it_and_holds_the_backbones_own_names(trained, run, config):
    run(COMMANDS[2])
    state = torch.load(trained / "small_vit.pth", weights_only=False)["state_dict"]
    wanted = build_on_meta(config.model).state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in wanted.items()
    }


def test_a_run_of_it_can_be_planned(run):
    shown = run(COMMANDS[3])
    assert "fits" in shown and "zero3_bf16" in shown


def test_each_layer_of_it_has_its_learning_rate(config):
    rates = {
        group["name"].split(",")[0]: group["lr"]
        for group in parameter_groups(build_on_meta(config.model), config.optimizer)
    }
    assert rates == pytest.approx(
        {f"layer {layer}": 1e-3 * 0.9 ** (5 - layer) for layer in (0, 1, 2, 3, 4, 5)}
    )


def test_it_computes_what_transformers_computes_with_the_same_folder(config, tmp_path):
    from transformers import ViTConfig, ViTModel

    theirs = ViTModel(
        ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, image_size=112
        )
    ).eval()
    theirs.save_pretrained(tmp_path)
    segmentor = build_segmentor(config.model).eval()
    found = match_backbone(segmentor, open_weights(tmp_path))
    assert not found.missing and {name.split(".")[0] for name in found.ignored} <= {"layernorm", "pooler"}
    load(segmentor, found)
    image = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        hidden = theirs(image, output_hidden_states=True).hidden_states
        for features, states in zip(segmentor.backbone(image), hidden[1:]):
            torch.testing.assert_close(features, states[:, 1:].mT.reshape(2, 64, 7, 7), rtol=1e-4, atol=1e-4)
