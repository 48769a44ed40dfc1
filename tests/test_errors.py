"""Words of messages."""

from internseg_ds.errors import are, counted


def test_counts_agree_with_their_nouns():
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(number, "process") for number in (1, 3)] == ["1 process", "3 processes"]
    assert [counted(number, "name differs", "names differ") for number in (1, 2)] == [
        "1 name differs",
        "2 names differ",
    ]
    assert [are(number) for number in (0, 1, 2)] == ["are", "is", "are"]
