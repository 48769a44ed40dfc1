import json

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from internseg_ds.config.ds_config import BackboneSizes, resolve_ds_config
from internseg_ds.config.ds_config_batch import BatchPerStep
from internseg_ds.errors import ConfigError
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B
from internseg_ds.models.repeated_blocks import repeated_block

ADAMW = {"type": "AdamW", "lr": 4e-5, "betas": (0.9, 0.999), "weight_decay": 0.05}


def resolve(raw, **changes):
    settings = {
        "experiment": "exp.py",
        "micro_batch": 2,
        "world_size": 4,
        "optimizer": ADAMW,
        "sizes": BackboneSizes(2000),
    } | changes
    return resolve_ds_config(raw, **settings)


def test_auto_values_are_filled_from_the_experiment():
    ds = resolve(
        {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
            },
        },
        per_step=BatchPerStep(16),
        gradient_clipping=0.1,
    )
    assert (
        ds.raw["train_micro_batch_size_per_gpu"],
        ds.raw["gradient_accumulation_steps"],
        ds.raw["train_batch_size"],
    ) == (2, 2, 16)
    assert ds.raw["gradient_clipping"] == 0.1
    zero = ds.raw["zero_optimization"]
    assert (
        zero["reduce_bucket_size"],
        zero["stage3_prefetch_bucket_size"],
        zero["stage3_param_persistence_threshold"],
    ) == (4_000_000, 3_600_000, 20_000)
    assert (ds.stage, ds.precision, ds.param_dtype, ds.global_batch) == (3, "bf16", torch.bfloat16, 16)


def test_zero3_sizes_are_those_of_the_block_that_the_backbone_repeats():
    with torch.device("meta"):
        block = repeated_block(InternViT6B())
    assert (
        block.class_name == "internseg_ds.models.intern_vit.intern_vit_6b.Block"
        and sum(block.sizes) == 122_918_400
    )
    sizes = {
        key: "auto"
        for key in (
            "reduce_bucket_size",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "leaf_module",
        )
    }
    zero = resolve({"zero_optimization": {"stage": 3, **sizes}}, sizes=BackboneSizes(3200, block)).raw[
        "zero_optimization"
    ]
    assert zero["reduce_bucket_size"] == 122_918_400  # 12 x 3200^2 in matrices and 12 x 3200 in vectors
    # the vectors stay
    assert (
        zero["stage3_prefetch_bucket_size"] == 122_880_000
        and zero["stage3_param_persistence_threshold"] == 32_000
    )
    assert zero["leaf_module"] == {"classes": ["internseg_ds.models.intern_vit.intern_vit_6b.Block"]}
    assert repeated_block(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 4))) is None


def test_clipping_is_written_out_because_deepspeeds_default_clips_at_1():
    assert resolve({}).raw["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("raw", "precision"),
    [
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": True}}, "autocast"),
        ({"torch_autocast": {"enabled": False}}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_the_precision_is_read(raw, precision):
    assert resolve(raw).precision == precision


def test_accumulation_may_come_from_the_ds_config_when_the_experiment_is_silent():
    assert resolve({"gradient_accumulation_steps": 3}).global_batch == 24


@pytest.mark.parametrize(
    ("raw", "changes", "words"),
    [
        ({"train_batch_size": 99}, {}, ["99", "4 processes x 2 images x 1", "drop train_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, {}, ["data.samples_per_gpu=2", "auto"]),
        (
            {"gradient_accumulation_steps": 3},
            {"per_step": BatchPerStep(16)},
            ["gradient_accumulation_steps=3", "engine.global_batch=16", "auto"],
        ),
        ({"gradient_accumulation_steps": 0}, {}, ["at least 1"]),
        ({}, {"per_step": BatchPerStep(12)}, ["12 images", "4 processes x 2 images", "divides"]),
        ({"gradient_clipping": 1.0}, {}, ["gradient_clipping=1.0", "grad_clip"]),
        ({"fp16": {"enabled": True}}, {}, ["fp16", "bf16"]),
        ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": True}}, {}, ["both enabled"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, {}, ["bfloat16"]),
        (
            {"zero_optimisation": {"stage": 3}},
            {},
            ["unknown key 'zero_optimisation'", "did you mean 'zero_optimization'"],
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 5}},
            {},
            ["unknown key 'stage3_prefetch_bucket'", "stage3_prefetch_bucket_size"],
        ),
        ({"zero_optimization": {"stage": "three"}}, {}, ["zero_optimization.stage='three'", "1, 2 or 3"]),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, {}, ["check_grad_overflow", "drop it"]),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            {},
            ["zero_hpz_partition_size=3", "divides the 4 processes"],
        ),
        ({"torch_autocast": {"enable": True}}, {}, ["unknown key 'enable'", "enabled"]),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}},
            {},
            ["reduce_bucket_size='big'", "DeepSpeedZeroConfig"],
        ),
        ({"bf16": True}, {}, ["must be a section"]),
        ({"torch_autocast": True}, {}, ["torch_autocast", "must be a section"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": 5}},
            {},
            ["offload_optimizer of zero_optimization", "must be a section"],
        ),
        ({"bf16": {"enable": True}}, {}, ["enable", "BF16"]),
        ({"bf16": {"enabled": "yes"}}, {}, ["bf16.enabled='yes'", "true or false"]),
        ({"comms_logger": {"enable": True}}, {}, ["enable=True", "CommsLogger"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {},
            ["named twice", "lr=0.001", "lr=4e-05", "drop the optimizer"],
        ),
        ({"optimizer": {"type": "SGD"}}, {}, ["named twice", "SGD"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["scheduler", "lr_config"]),
        (
            {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}},
            {},
            ['sub_group_size="auto"', "cannot be filled"],
        ),
    ],
)
def test_a_contradiction_is_one_sentence_with_the_mend(raw, changes, words):
    with pytest.raises(ConfigError) as caught:
        resolve(raw, **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_deepspeeds_clock_of_samples_which_waits_for_the_device_runs_only_where_it_is_asked_for():
    for given, enabled in (
        ({}, False),
        ({"timers": None}, False),
        ({"timers": {"throughput": {"enabled": True}}}, True),
    ):
        raw = resolve({"zero_optimization": {"stage": 3}, **given}).raw
        assert DeepSpeedConfig(raw | {"train_batch_size": 2}).timers_config.enabled is enabled


def test_null_sections_are_no_sections():
    ds = resolve(
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": None},
            "fp16": None,
            "optimizer": {"type": "AdamW", "params": None},
        }
    )
    assert ds.stage == 3 and not ds.cpu_adam


def test_an_optimizer_section_with_the_same_values_is_no_contradiction():
    section = {"type": "adamw", "params": {"lr": 4e-5, "betas": [0.9, 0.999], "weight_decay": "auto"}}
    assert "optimizer" not in resolve({"optimizer": section}).raw


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no ds_config"),
        ("{", "is not JSON"),
        ("[1]", "one JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_ds_config_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=words):
        resolve(path)


def test_the_users_dict_is_left_as_it_was():
    raw = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    before = json.dumps(raw)
    resolve(raw)
    assert json.dumps(raw) == before
