"""The table of parameter groups that `--dry-run` prints."""

import torch

from internseg_ds.preflight.dry_run import groups_table


def group(name: str, *sizes: int, lr: float = 1.0, weight_decay: float = 0.0) -> dict:
    return dict(name=name, params=[torch.empty(size) for size in sizes], lr=lr, weight_decay=weight_decay)


def rows(groups: list[dict]) -> list[tuple[str, ...]]:
    return list(zip(*(column._cells for column in groups_table(groups).columns), strict=True))


def test_layers_in_a_row_are_one_row_where_they_differ_in_their_rate_alone():
    layers = [
        each
        for layer in range(4)
        for each in (
            group(f"layer {layer}, no decay", 2, lr=0.5 ** (4 - layer)),
            group(f"layer {layer}, decay", 600, 400, lr=0.5 ** (4 - layer), weight_decay=0.05),
        )
    ]
    # of another size in the middle, and of none
    layers[4]["params"].append(torch.empty(1))
    layers += [group("layer 4, decay", 7, weight_decay=0.05), group("lr 1, weight decay 0", 3)]
    assert rows(layers) == [
        ("layers 0-1, no decay", "1 each", "2 each", "0.0625 - 0.125", "0"),
        ("layers 0-3, decay", "2 each", "1,000 each", "0.0625 - 0.5", "0.05"),
        ("layer 2, no decay", "2", "3", "0.25", "0"),
        ("layer 3, no decay", "1", "2", "0.5", "0"),
        ("layer 4, decay", "1", "7", "1", "0.05"),
        ("lr 1, weight decay 0", "1", "3", "1", "0"),
    ]
