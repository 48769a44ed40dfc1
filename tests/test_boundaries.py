"""The rooms of the package: which may import which, what loads DeepSpeed, and that no code outside `models`
names a model."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import internseg_ds

PACKAGES = [
    "internseg_ds",
    "internseg_ds.models",
    "internseg_ds.data",
    "internseg_ds.checkpoints.weights",
    "internseg_ds.checkpoints.consolidate",
    "internseg_ds.planning.zero_memory",
    "internseg_ds.planning.step_time",
    "internseg_ds.planning.flops",
    "internseg_ds.training.keep_running",
]
FORKING = """
import os, sys
# once, for all of the interpreters that are forked from this one; none of them loads DeepSpeed
import mmcv, mmseg.datasets, mmseg.models, torch
assert not any(name.startswith(("deepspeed", "internseg_ds")) for name in sys.modules)
for package in sys.argv[1:]:
    if (pid := os.fork()) == 0:
        __import__(package)
        print(package, "loads DeepSpeed" if "deepspeed" in sys.modules else "is free of it", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def test_parts_that_need_no_engine_load_no_deepspeed_and_can_be_imported_first():
    done = subprocess.run([sys.executable, "-c", FORKING, *PACKAGES], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{package} is free of it" for package in PACKAGES], done.stderr


ORDER = [
    "cli",
    "data_report",
    "training",
    "run_report",
    "evaluation",
    "preflight",
    "monitoring",
    "planning",
    "optimization",
    "distributed",
    "config",
    "checkpoints",
    "data",
    "synthetic",
    "models",
]
"""The rooms of the package, from the highest: each imports from those behind it only, and from the single
files beside them."""
MOST_FILES = 16
PACKAGE = Path(internseg_ds.__file__).parent
IMPORT = re.compile(r"\s*(?:from|import) internseg_ds\.(\w+)")


def test_every_folder_has_its_place_in_the_order():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        ORDER
    )


@pytest.mark.parametrize("room", ORDER)
def test_imports_point_downwards_only(room):
    for file in (PACKAGE / room).rglob("*.py"):
        imported = {found[1] for line in file.read_text().splitlines() if (found := IMPORT.match(line))}
        assert not imported & set(ORDER[: ORDER.index(room)]), file


def test_no_folder_holds_more_than_can_be_looked_over():
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert not {
        folder: count for folder in folders if (count := len(list(folder.glob("[!_]*.py")))) > MOST_FILES
    }


@pytest.mark.parametrize(
    "folder",
    [*(f"internseg_ds/{room}" for room in ORDER if room not in ("data", "synthetic", "models")), "launch"],
)
def test_code_that_serves_every_model_names_none(folder):
    import ast

    from mmseg.datasets import PIPELINES
    from mmseg.models import BACKBONES

    import internseg_ds.data.transforms
    import internseg_ds.models  # noqa: F401 - registers ours

    ours = {
        name
        for registry in (BACKBONES, PIPELINES)
        for name, kind in registry.module_dict.items()
        if kind.__module__.startswith("internseg_ds.")
    }
    # heads that override mmseg's have the names of theirs
    assert {"InternViT6B", "Mask2FormerHead", "ToMask"} <= ours
    names = (
        ours
        | {name for name in BACKBONES.module_dict if name.endswith(("Transformer", "Head"))}
        | {"intern_vit", "intern_image", "internvit", "internimage"}
    )
    for file in (PACKAGE.parent / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node, clean=False) is not None
            ):
                node.body[0].value.value = ""  # a docstring may cite where a rule comes from
            said = [
                getattr(node, "id", None),
                getattr(node, "attr", None),
                getattr(node, "module", None),
                getattr(node, "name", None),
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None,
            ]
            for text in filter(None, said):
                # a command of --help, a config to start from
                is_example = "launch/" in text or text.startswith("configs/")
                assert is_example or not [name for name in names if name.lower() in text.lower()], (
                    f"{file}:{getattr(node, 'lineno', 0)}: {text}"
                )
