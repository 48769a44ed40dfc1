import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["internseg_ds", "internseg_ds.models", "internseg_ds.data", "internseg_ds.checkpoints.weights", "internseg_ds.checkpoints.consolidate",
                                     "internseg_ds.planning.memory", "internseg_ds.planning.step_time", "internseg_ds.planning.training_pass", "internseg_ds.engine.restarting"])
def test_parts_that_need_no_engine_load_no_deepspeed(package):
    code = f"import sys, {package}; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(("lower", "higher"), [
    ("models", ("data", "checkpoints", "distributed", "engine", "planning")),
    ("data", ("models", "checkpoints", "distributed", "engine", "planning")),
    ("checkpoints", ("models", "data", "distributed", "engine", "planning")),
    ("planning", ("data", "checkpoints", "distributed", "engine")),
    ("distributed", ("engine",)),
])
def test_imports_point_downwards_only(lower, higher):
    import re
    from pathlib import Path

    package = Path(__file__).parent.parent / "internseg_ds"
    for file in (package / lower).glob("*.py"):
        imported = re.findall(r"internseg_ds\.(\w+)", "\n".join(line for line in file.read_text().splitlines() if re.match(r"\s*(from|import) ", line)))
        assert not set(imported) & set(higher), file
