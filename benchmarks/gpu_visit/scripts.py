"""The other scripts of benchmarks/ as jobs: started as a user would, their last line of JSON is the
result."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_visit.results import ROOT
from gpu_visit.visit import Visit


def run_script(visit: Visit, script: str, words: Sequence[str]) -> None:
    visit.measure(
        script,
        {"arguments": " ".join(words).replace(f"{ROOT}/", "")},
        lambda: _result_of(script, words, visit.deadline - time.monotonic()),
    )


def _result_of(script: str, words: Sequence[str], seconds: float) -> Mapping[str, Any]:
    """The script's last line; what it prints goes to this process's output as well. Raises RuntimeError where
    it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=max(1.0, seconds),
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks/{script} ended with {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found if isinstance(found, dict) else {"result": found}
