import pytest

from internseg_ds.models.activation_checkpointing import set_recomputation
from internseg_ds.planning.block_work import BlockPass, block_work
from tests.conftest import TINY
from tests.planning.test_flops import build

TOKENS, WIDTH, BLOCKS = 65, 128, 4
"""Of the tiny config at 112 x 112."""
# qkv, projection and two layers of 4 times the width
WEIGHTS = BLOCKS * 12 * WIDTH**2
FORWARD = BlockPass(
    block_elements=BLOCKS * TOKENS * WIDTH,
    float8_flops=2 * TOKENS * WEIGHTS,
    converted=BLOCKS * TOKENS * (3 + 4) * WIDTH,
    converted_weights=WEIGHTS,
)
BACKWARD = BlockPass(
    block_elements=BLOCKS * TOKENS * WIDTH,
    float8_flops=2 * TOKENS * WEIGHTS,
    converted=BLOCKS * TOKENS * (3 + 1 + 4 + 1) * WIDTH,
    converted_weights=WEIGHTS,
)


def work_under(policy, **options):
    model = build(TINY, **options)
    set_recomputation(model, policy)
    return block_work(model, 112, 112)


def test_the_work_of_the_blocks_is_what_their_sizes_say():
    found = work_under("none")
    assert (found.forward, found.backward, found.recomputed) == (FORWARD, BACKWARD, BlockPass())


def test_what_is_recomputed_is_seen_and_products_that_are_kept_are_not_made_again():
    found = work_under("blocks")
    assert (found.forward, found.backward, found.recomputed) == (FORWARD, BACKWARD, FORWARD)
    kept = work_under("all_but_matmuls")
    assert kept.recomputed.float8_flops == 0
    assert kept.recomputed.block_elements == FORWARD.block_elements
    half = work_under(2)
    assert half.recomputed.float8_flops == pytest.approx(FORWARD.float8_flops / 2)


def test_frozen_blocks_have_no_backward_pass():
    found = work_under("blocks", **{"model.backbone.freeze_vit": True})
    assert found.forward == FORWARD
    assert found.backward == found.recomputed == BlockPass()
