from torch import nn

from internseg_ds.planning.flops import Use
from internseg_ds.planning.gathered_weights import Gathers, GatherSettings, gathers, persistent

NOTHING_AHEAD = dict(prefetch_bucket_size=0, param_persistence_threshold=0)


def chain(*sizes: int) -> nn.Module:
    """Modules "0", "1", ... with one weight of so many elements each."""
    return nn.Sequential(*(nn.Linear(size, 1, bias=False, device="meta") for size in sizes))


def there_and_back(*names: str) -> list[Use]:
    return [Use(name, begins) for name in (*names, *reversed(names)) for begins in (True, False)]


def names(found: Gathers) -> list[list[str]]:
    return [[param.removesuffix(".weight") for param in params] for params in found.calls]


def test_weights_are_gathered_for_the_forward_and_again_for_the_backward_pass():
    settings = GatherSettings(max_reuse_distance=0, **NOTHING_AHEAD)
    assert names(gathers(chain(10, 10, 10), there_and_back("0", "1", "2"), settings)) == [
        ["0"],
        ["1"],
        ["2"],
        ["2"],
        ["1"],
        ["0"],
    ]


def test_weights_that_are_needed_again_soon_stay():
    # after "1" in the forward pass come "2" and "2" again before it is needed: 20 elements; after "0" come 40
    for distance, second_time in ((1, ["1", "0"]), (20, ["1", "0"]), (21, ["0"]), (40, ["0"]), (41, [])):
        made = names(
            gathers(
                chain(10, 10, 10),
                there_and_back("0", "1", "2"),
                GatherSettings(max_reuse_distance=distance, **NOTHING_AHEAD),
            )
        )
        assert made == [["0"], ["1"], ["2"], *([name] for name in second_time)], distance


def test_recomputing_a_block_just_before_its_backward_pass_gathers_nothing_more():
    uses = [
        *there_and_back("0", "1")[:4],
        Use("1", True),
        Use("1", False),
        Use("1", True),
        Use("1", False),
        Use("0", True),
        Use("0", False),
        Use("0", True),
        Use("0", False),
    ]
    made = gathers(chain(10, 10), uses, GatherSettings(max_reuse_distance=10, **NOTHING_AHEAD))
    assert names(made) == [["0"], ["1"], ["0"]]


def test_small_parameters_are_never_gathered_during_a_micro_batch():
    model = chain(10, 100, 10)
    settings = GatherSettings(max_reuse_distance=0, prefetch_bucket_size=0, param_persistence_threshold=10)
    assert names(gathers(model, there_and_back("0", "1", "2"), settings)) == [["1"], ["1"]]
    assert persistent(model, settings) == {"0.weight", "2.weight"}
    assert persistent(
        model, GatherSettings(param_persistence_threshold=10, model_persistence_threshold=15)
    ) == {"0.weight"}


def test_weights_are_gathered_ahead_in_buckets():
    settings = GatherSettings(max_reuse_distance=0, prefetch_bucket_size=15, param_persistence_threshold=0)
    made = names(
        gathers(
            chain(10, 10, 10, 10, 10, 10),
            [Use(str(index), begins) for index in range(6) for begins in (True, False)],
            settings,
        )
    )
    # 2 is on its way when 1 begins, and with it the next two
    assert made == [["0"], ["1", "2"], ["3", "4"], ["5"]]


def test_settings_come_from_the_ds_config_or_are_deepspeeds():
    assert GatherSettings.of(
        {"stage3_max_reuse_distance": 1e6, "stage3_prefetch_bucket_size": 7}
    ) == GatherSettings(max_reuse_distance=1_000_000, prefetch_bucket_size=7)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3)
    assert GatherSettings() == GatherSettings(
        theirs.prefetch_bucket_size,
        theirs.max_live_parameters,
        theirs.max_reuse_distance,
        theirs.param_persistence_threshold,
    )
