"""EoMT under the engine: it trains and is scored under ZeRO-3, and goes on where masked attention was."""

import pytest

from tests.conftest import EOMT

OPTIONS = [
    "runner.max_iters=6",
    "checkpoint_config.interval=3",
    "evaluation.interval=6",
    "evaluation.save_best=None",
    "lr_config.warmup_iters=2",
    "model.decode_head.num_queries=10",
    "model.train_cfg.num_points=64",
]


@pytest.fixture(scope="module")
def trained(train, fp32):
    """6 steps under ZeRO-3 in fp32 on 2 processes: masks are gone from block 3 in the third and from block 4 in
    the sixth."""
    return train("--deepspeed_config", fp32, config=EOMT, options=OPTIONS)


def test_masked_attention_goes_away_block_after_block(trained):
    shares = [record["decode.masked_share"] for record in trained.records if "loss" in record]
    assert shares == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.5, 0.0], abs=1e-6)


def test_resumed_it_has_the_losses_and_scores_of_an_unbroken_run(trained, train, fp32):
    """Which it has only if masked attention is annealed from where it was, and if partitioned weights segment
    as whole ones."""
    resumed = train(
        *("--resume", trained.work_dir / "checkpoints" / "iter_3", "--deepspeed_config", fp32),
        config=EOMT,
        options=[*OPTIONS, "engine.evaluation_weights=partitioned"],
    )
    assert sorted(trained.losses) == [1, 2, 3, 4, 5, 6] and len(set(trained.losses.values())) == 6
    assert resumed.losses == pytest.approx(
        {step: loss for step, loss in trained.losses.items() if step > 3}, rel=1e-5
    )
    assert list(trained.scores) == [6] and resumed.scores == pytest.approx(trained.scores, abs=1e-4)
