"""The tests that need a GPU, by pytest in this process: a line for each as it ends, so that a hang costs the
later ones only."""

import time
from pathlib import Path

import pytest

from gpu_visit.results import ROOT
from gpu_visit.visit import OutOfTime, Visit

PATTERNS = ("tests/**/test_*gpu*.py", "tests/**/test_*triton*.py")
REHEARSED = "tests/end_to_end/test_on_gpu.py"


class Lines:
    """A pytest plugin."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            why = (
                {}
                if report.passed
                else {
                    "why": str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[
                        -1500:
                    ]
                }
            )
            status = report.outcome if report.when == "call" or report.skipped else "failed"
            self.visit.add(
                status, name=report.nodeid, settings={}, figures={"seconds": round(report.duration, 2)}, **why
            )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.visit.add("failed", name=report.nodeid, settings={}, why=str(report.longrepr)[-1500:])

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() > self.visit.deadline:
            item.session.shouldstop = "no time is left"


def run(visit: Visit, *, files: tuple[str, ...] = ()) -> None:
    """files: default all that are told by their names."""
    found = list(files) or ([REHEARSED] if visit.rehearse else test_files())
    left_out = [f"--deselect={name}" for name in _had(visit)]
    lines = Lines(visit)
    code = pytest.main(
        [
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(ROOT),
            *left_out,
            *(str(Path(ROOT, path)) for path in found),
        ],
        plugins=[lines],
    )
    if code == pytest.ExitCode.INTERRUPTED:
        raise OutOfTime
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {code!r}")


def test_files() -> list[str]:
    """Without those of the benchmarks, which need no GPU."""
    found = {path.relative_to(ROOT) for pattern in PATTERNS for path in ROOT.glob(pattern)}
    return sorted(str(path) for path in found if path.parts[1] != "benchmarks")


def _had(visit: Visit) -> list[str]:
    """Tests that passed, or failed, before."""
    return [
        line["name"]
        for line in visit.results.lines()
        if line["job"] == visit.job and "name" in line and visit.is_had(line["name"], {})
    ]
