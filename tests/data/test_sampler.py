from itertools import islice

import pytest

from internseg_ds.data.sampler import GlobalBatchSampler

LENGTH, GLOBAL_BATCH = 10, 12


def global_batches(
    world_size: int, micro_batch: int, steps: int, seed: int = 3, start: int = 0
) -> list[list[int]]:
    """The images of each step, in stream order, as all ranks together see them."""
    accumulation = GLOBAL_BATCH // (world_size * micro_batch)
    seen = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            LENGTH, micro_batch, rank=rank, world_size=world_size, seed=seed, start=start
        )
        seen.append(list(islice(sampler, steps * accumulation)))
    batches = []
    for step in range(steps):
        keys = [
            key
            for rank in seen
            for micro in rank[step * accumulation : (step + 1) * accumulation]
            for key in micro
        ]
        batches.append([image for _, image in sorted(keys)])
    return batches


@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 4), (2, 6), (2, 3), (3, 2), (4, 3), (6, 1), (12, 1)]
)
def test_the_kth_global_batch_holds_the_same_images_however_it_is_split(world_size, micro_batch):
    assert global_batches(world_size, micro_batch, steps=5) == global_batches(1, 12, steps=5)


def test_every_epoch_sees_every_image_once_and_epochs_differ():
    images = [image for batch in global_batches(1, 12, steps=5) for image in batch]  # 60 = 6 epochs of 10
    epochs = [images[first : first + LENGTH] for first in range(0, 60, LENGTH)]
    assert all(sorted(epoch) == list(range(LENGTH)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_another_seed_gives_another_order():
    assert global_batches(1, 12, steps=1, seed=3) != global_batches(1, 12, steps=1, seed=4)


def test_a_stream_resumed_inside_an_epoch_on_other_processes_goes_on_where_it_stopped():
    unbroken = global_batches(1, 12, steps=5)
    assert global_batches(2, 2, steps=3, start=2 * GLOBAL_BATCH) == unbroken[2:]
