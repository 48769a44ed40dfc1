"""How often the host reads what a GPU computes, counted in real trainings on the CPU."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.distributed.ranks import spawn
from tests.small_experiment import small_experiment

STEPS, FIRST = 8, 3
DEEPSPEED = {
    "zero1_bf16": ("stage_1_and_2.py:has_overflow", "utils.py:is_invalid_grad_norm"),
    "zero2_bf16": ("stage_1_and_2.py:has_overflow", "utils.py:is_invalid_grad_norm"),
    "zero3_bf16": ("utils.py:is_invalid_grad_norm",),
}
"""Whether a gradient is not finite on any rank, which decides on the host whether the step is skipped: one
wait, after the backward pass; the second read follows the first at once."""


def reads_of_a_step(root, work_dir, name) -> None:
    from internseg_ds import SegmentorEngine
    from internseg_ds.training import trainer
    from tests.waits import HostReads

    reads, seen = HostReads(), {}
    experiment = small_experiment(
        root, f"runner.max_iters={STEPS}", "log_config.interval=100", "checkpoint_config.interval=0"
    )
    with SegmentorEngine(
        experiment, ROOT / f"ds_configs/{name}.json", work_dir=work_dir, validate=False
    ) as engine:
        engine.options = replace(engine.options, saves=False)
        after = trainer.NonfiniteSteps.after_step

        def at_the_end_of_a_step(skipped, step, micro_batches):
            seen[step] = Counter(reads.found)
            return after(skipped, step, micro_batches)

        trainer.NonfiniteSteps.after_step = at_the_end_of_a_step
        with reads:
            engine.train()
    steps = STEPS - 1 - FIRST
    found = {place: count / steps for place, count in (seen[STEPS - 1] - seen[FIRST]).items()}
    of_data = ("sampler.py:", "loading.py:")  # which never was on a device
    # the ranks' flags were copied to the host before, behind what DeepSpeed waits for
    expected = {"process_group.py:result": 1, **dict.fromkeys(DEEPSPEED[name], 1)}
    assert {place: count for place, count in found.items() if not place.startswith(of_data)} == expected, (
        found
    )


@pytest.mark.parametrize("name", DEEPSPEED)
def test_between_records_the_host_reads_what_deepspeed_decides_by_and_nothing_else(ade20k, tmp_path, name):
    spawn(reads_of_a_step, 2, ade20k, tmp_path / "run", name)
