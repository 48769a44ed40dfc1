import subprocess
import sys

import pytest

PACKAGES = [
    "internseg_ds",
    "internseg_ds.models",
    "internseg_ds.data",
    "internseg_ds.checkpoints.weights",
    "internseg_ds.checkpoints.consolidate",
    "internseg_ds.planning.memory",
    "internseg_ds.planning.step_time",
    "internseg_ds.planning.training_pass",
    "internseg_ds.engine.restarting",
]
FORKING = """
import os, sys
import mmcv, mmseg.datasets, mmseg.models, torch  # once, for all of the interpreters that are forked from this one; none of them loads DeepSpeed
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


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ("models", ("data", "checkpoints", "distributed", "engine", "planning")),
        ("data", ("models", "checkpoints", "distributed", "engine", "planning")),
        ("checkpoints", ("models", "data", "distributed", "engine", "planning")),
        ("planning", ("data", "checkpoints", "distributed", "engine")),
        ("distributed", ("engine",)),
    ],
)
def test_imports_point_downwards_only(lower, higher):
    import re
    from pathlib import Path

    package = Path(__file__).parent.parent / "internseg_ds"
    for file in (package / lower).glob("*.py"):
        imported = re.findall(
            r"internseg_ds\.(\w+)",
            "\n".join(line for line in file.read_text().splitlines() if re.match(r"\s*(from|import) ", line)),
        )
        assert not set(imported) & set(higher), file


@pytest.mark.parametrize(
    "folder",
    [
        "internseg_ds/engine",
        "internseg_ds/distributed",
        "internseg_ds/checkpoints",
        "internseg_ds/planning",
        "launch",
    ],
)
def test_code_that_serves_every_model_names_none(folder):
    import ast
    from pathlib import Path

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
    assert {
        "InternViT6B",
        "Mask2FormerHead",
        "ToMask",
    } <= ours  # heads that override mmseg's have the names of theirs
    names = (
        ours
        | {name for name in BACKBONES.module_dict if name.endswith(("Transformer", "Head"))}
        | {"intern_vit", "intern_image", "internvit", "internimage"}
    )
    for file in (Path(__file__).parent.parent / folder).glob("*.py"):
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
                is_example = "launch/" in text or text.startswith(
                    "configs/"
                )  # a command of --help, a config to start from
                assert is_example or not [name for name in names if name.lower() in text.lower()], (
                    f"{file}:{getattr(node, 'lineno', 0)}: {text}"
                )
