"""Writes docs/supported_models.md: whether each backbone and head of mmseg's registry trains and is
evaluated, tried at a tiny size with two processes.

python -m docs.tabulate_supported_models    # some 8 minutes on 2 cores
"""

import os

os.environ["INTERNSEG_DEVICE"] = os.environ["DS_ACCELERATOR"] = "cpu"  # before any import asks

import argparse
import tempfile
from pathlib import Path

from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k
from tests.end_to_end.every_model.cases import CASES, table
from tests.end_to_end.every_model.runs import sweep

OPENING = """# What trains as it is

Each model below, at a tiny size, took two steps under `ds_configs/zero3_bf16.json` with 2 processes on CPUs (gloo), its backbone in bf16, and was then
evaluated, from whole weights and from partitioned ones, which must segment alike. **Not on GPUs, and not to convergence**: that a loss goes down, or that a
published score is reached, is another matter. For a few of them, `tests/distributed` holds losses and weights against plain PyTorch.

All of it again: `python -m docs.tabulate_supported_models`; `make test-slow` holds this table against what comes out
(`tests/end_to_end/test_every_model.py`). Of mmseg's registry, `TIMMBackbone` was not tried, for it needs timm; `KernelUpdateHead` is a part of
`IterativeDecodeHead`.

"""

if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "ade"
        write_generated_ade20k(data, training=8, validation=3)
        Path(__file__).with_name("supported_models.md").write_text(
            OPENING + table(sweep(list(CASES), data, Path(folder) / "runs"))
        )
