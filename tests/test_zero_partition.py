import pytest

from internseg_ds.zero_partition import elements_of_rank, padded, share_per_rank


@pytest.mark.parametrize(
    ("numel", "ranks", "share", "held"),
    [
        (12, 4, 3, [(0, 3), (3, 6), (6, 9), (9, 12)]),
        (10, 4, 3, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (5, 4, 2, [(0, 2), (2, 4), (4, 5), (5, 5)]),  # the last rank holds padding alone
        (7, 1, 7, [(0, 7)]),
    ],
)
def test_a_parameter_is_cut_into_equal_shares_of_which_the_last_are_padded(numel, ranks, share, held):
    assert share_per_rank(numel, ranks) == share
    assert padded(numel, ranks) == share * ranks
    assert [elements_of_rank(rank, numel, share) for rank in range(ranks)] == held
