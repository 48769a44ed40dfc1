import logging
import subprocess
import sys
import warnings

import pytest

from internseg_ds.monitoring.run_log import LIBRARIES, MATTERS, begin_log, start_logging

SCRIPT = """
import sys
from pathlib import Path
from internseg_ds.monitoring.run_log import begin_log, start_logging
main = sys.argv[2] == "0"
begin_log()
import logging, warnings
import torch.utils.cpp_extension, mmseg.utils, deepspeed  # their loggers write to the console by themselves
warnings.warn_explicit("old", FutureWarning, torch.__file__, 1)
start_logging(Path(sys.argv[1]), level="INFO", is_main=main)
from internseg_ds.distributed.extensions import prints_logged
with prints_logged():
    print("an extension is built")
mmseg.utils.get_root_logger().info("Loaded 3 images")
deepspeed.utils.logger.warning("an untested optimizer")
logging.getLogger("torch._dynamo.convert_frame").warning("torch._dynamo hit config.recompile_limit (8)")
logging.getLogger("torch.distributed").warning("something is deprecated")
deepspeed.utils.logger.warning("pytorch allocator cache flushes; this happens when there is high memory pressure")
deepspeed.utils.logger.warning("pytorch allocator cache flushes; this happens when there is high memory pressure")
logging.getLogger("torch.distributed").error("a rank is gone")
warnings.warn_explicit("own", UserWarning, "/home/me/model.py", 3)
code = "import logging; logging.warning('by the root'); logging.getLogger('some').warning(__file__)"
for file in (torch.__file__, "/home/me/data.py"):  # as code of that file does
    exec(compile(code, file, "exec"), {"__file__": file})
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_lines_of_libraries_go_to_a_file_of_rank_0_but_for_what_matters(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), rank], capture_output=True, text=True, check=True
    )
    shown = [line.split(" ", 1)[1] for line in done.stderr.splitlines()]
    assert done.stdout == ""
    if rank == "1":
        assert shown == ["torch: a rank is gone"] and list(tmp_path.iterdir()) == []
        return
    assert shown == [
        "torch: torch._dynamo hit config.recompile_limit (8)",
        "DeepSpeed: pytorch allocator cache flushes; this happens when there is high memory pressure",
        "torch: a rank is gone",
        "python: /home/me/model.py:3: UserWarning: own",
        "root: by the root",
        "some: /home/me/data.py",
    ]
    kept = (tmp_path / "libraries.log").read_text()
    for said in ("FutureWarning: old", "an extension is built", "Loaded 3 images", "an untested optimizer"):
        assert kept.count(said) == 1
    for said in (
        "is deprecated",
        "a rank is gone",
        "recompile_limit",
        "root: by the root",
        "torch/__init__.py",
    ):
        assert said in kept
    assert "Loaded" not in (tmp_path / "train.log").read_text()


@pytest.fixture
def restored():
    """Takes back what a log of a run changes."""
    showwarning = warnings.showwarning
    yield
    logging.captureWarnings(False)
    warnings.showwarning = showwarning
    for name in (*LIBRARIES, "torch.utils.cpp_extension", "internseg_ds"):
        logger = logging.getLogger(name)
        logger.filters.clear()
        logger.handlers.clear()
        logger.propagate = True


def test_a_run_gets_the_lines_of_its_command_and_not_those_of_a_run_before_it(tmp_path, restored, capfd):
    log = logging.getLogger("internseg_ds.training")
    begin_log()
    log.info("loading torch")
    start_logging(None, level="INFO", is_main=True)
    log.info("meeting")
    start_logging(tmp_path, level="INFO", is_main=True, header=["python 3"])
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["python 3", "loading torch", "meeting"]
    (tmp_path / "other").mkdir()
    start_logging(None, level="INFO", is_main=True)
    log.info("refused")
    start_logging(None, level="INFO", is_main=True)
    start_logging(tmp_path / "other", level="INFO", is_main=True)
    log.info("on we go")
    assert "refused" not in (tmp_path / "other/train.log").read_text()
    assert capfd.readouterr().err.count("loading torch") == 1


@pytest.mark.parametrize(
    "text",
    [
        "Function 'MmBackward0' returned nan values in its 0th output.",
        "torch._dynamo hit config.recompile_limit (8)",
        "WON'T CONVERT forward model.py line 3",
        "NCCL WARN Call to connect returned Connection refused",
        "cumsum_cuda_kernel does not have a deterministic implementation, but you set warn_only",
        "OVERFLOW! Rank 0 Skipping step.",
        "this happens when there is high memory pressure and is detrimental to performance",
        "This DataLoader will create 16 worker processes in total, excessive worker creation might get slow",
    ],
)
def test_what_matters_is_shown(text):
    assert MATTERS.search(text)


@pytest.mark.parametrize("text", ["Loaded 20210 images", "an information", "a nanosecond", "is deprecated"])
def test_what_does_not_matter_is_not(text):
    assert not MATTERS.search(text)
