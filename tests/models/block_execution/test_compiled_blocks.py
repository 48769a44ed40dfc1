"""Compiled blocks against the same blocks uncompiled: losses, gradients, what is kept, how often is compiled, and
what happens where a block cannot be compiled.

But for the slow ones, tests leave out the last part of compiling, from graphs to machine code, which takes
minutes."""

import copy
import logging

import pytest
import torch
from mmseg.models import build_backbone
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

import internseg_ds.models  # noqa: F401 - registers the backbones
from internseg_ds.models.activation_checkpointing import runs_compiled, set_recomputation
from internseg_ds.models.block_execution.compiled_blocks import compile_blocks
from internseg_ds.models.block_execution.drop_path_draws import kept_images
from internseg_ds.models.repeated_blocks import block_names
from internseg_ds.torch_internals import reset_parameters_of

GRAPHS = "aot_eager_decomp_partition"
"""torch.compile's backend that traces and divides graphs into forward and backward, and compiles nothing."""
# 3 blocks with 3 drop-path rates: 0, for which there is no module, and two others
BACKBONES = {
    "InternViT": dict(
        type="InternViT6B",
        embed_dim=32,
        num_heads=2,
        depth=3,
        img_size=56,
        out_indices=[2],
        drop_path_rate=0.6,
    ),
    "InternImage": dict(
        type="InternImage", channels=8, depths=[3], groups=[2], out_indices=[0], drop_path_rate=0.6
    ),
    "timm": dict(
        type="TimmBackbone",
        model_name="vit_small_patch16_dinov3",
        model_args=dict(embed_dim=32, depth=3, num_heads=2),
        drop_path_rate=0.6,
    ),
}
SIDES = {"InternViT": 56, "InternImage": 48, "timm": 64}
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    backbone = build_backbone(BACKBONES[name]).train()
    for module in backbone.modules():
        if (reset := reset_parameters_of(module)) is not None:
            reset()
    set_recomputation(backbone, "none")
    return backbone


def compiled_copy(backbone: nn.Module, backend: str = GRAPHS) -> nn.Module:
    compiled = copy.deepcopy(backbone)
    compile_blocks(compiled, block_names(compiled), backend)
    return compiled


def step(backbone: nn.Module, images: Tensor) -> tuple[float, list[float]]:
    """The loss, and the norm of each parameter's gradient, always with the same random numbers."""
    backbone.zero_grad()
    torch.manual_seed(5)
    loss = sum(features.float().square().mean() for features in backbone(images))
    loss.backward()
    return loss.item(), [
        param.grad.norm().item() for param in backbone.parameters() if param.grad is not None
    ]


def agree(found: tuple[float, list[float]], expected: tuple[float, list[float]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "policies", "backend"),
    [
        ("InternViT", ("none", "blocks"), GRAPHS),
        pytest.param("InternViT", ("none", "blocks", 2, "all_but_matmuls"), "inductor", marks=SLOW),
        pytest.param("InternImage", ("none", "blocks", "all_but_matmuls"), "inductor", marks=SLOW),
        pytest.param("timm", ("none", "blocks", "all_but_matmuls"), "inductor", marks=SLOW),
    ],
)
def test_losses_and_gradients_are_those_of_uncompiled_blocks_and_no_step_but_the_first_compiles(
    name, policies, backend
):
    backbone, images = built(name), torch.randn(2, 3, SIDES[name], SIDES[name])
    compiled = compiled_copy(backbone, backend)
    assert list(compiled.state_dict()) == list(backbone.state_dict())
    assert [type(module).__qualname__ for module in compiled.modules()] == [
        type(module).__qualname__ for module in backbone.modules()
    ]
    for policy in policies:
        set_recomputation(compiled, policy)
        set_recomputation(backbone, policy)
        agree(step(compiled, images), step(backbone, images))
        graphs = counters["stats"]["unique_graphs"]
        agree(step(compiled, images), step(backbone, images))
        assert counters["stats"]["unique_graphs"] == graphs > 0
        # as many as there are kinds of blocks: with and without drop-path, and where the input needs no gradient
        assert graphs <= 3 * (1 + policies.index(policy))
        assert not counters["graph_break"]


@SLOW
@pytest.mark.parametrize("name", list(BACKBONES))
def test_an_evaluation_on_images_of_any_size_compiles_two_graphs_of_each_kind_of_block(name):
    backbone = built(name).eval()
    compiled = compiled_copy(backbone)
    side = SIDES[name]
    with torch.no_grad():
        for count, height, width in ((1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 3, 2), (1, 2, 3), (4, 1, 2)):
            images = torch.randn(count, 3, height * side, width * side)
            for found, expected in zip(compiled(images), backbone(images)):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if (count, height) == (2, 1):
                graphs = counters["stats"]["unique_graphs"]
    kinds = len({type(block) for block in compiled.modules() if runs_compiled(block)})
    # the compiler takes sizes that are equal (height and width) for one number until they differ
    later = kinds if name == "InternImage" else 0
    assert graphs == 2 * kinds and counters["stats"]["unique_graphs"] == graphs + later


@SLOW
def test_all_but_matmuls_keeps_less_in_compiled_blocks_too():
    def kept(backbone: nn.Module, policy: str) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        set_recomputation(backbone, policy)
        for _ in range(2):
            sizes.clear()
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = backbone(torch.zeros(2, 3, 112, 112))
        del outputs
        return sum(sizes.values())

    backbone = compiled_copy(built("InternViT"))
    assert kept(backbone, "all_but_matmuls") < 0.8 * kept(backbone, "none")


class Branching(nn.Module):
    """What it computes depends on values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Plain(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_a_block_that_breaks_a_graph_runs_uncompiled_and_is_logged_once(caplog):
    blocks = nn.Sequential(*(Branching() for _ in range(3)))
    compiled, x = copy.deepcopy(blocks), torch.ones(2, 4)
    compile_blocks(compiled, ["0", "1", "2"], GRAPHS)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(compiled(x), blocks(x))
    assert [record.getMessage().partition(", so")[0] for record in caplog.records] == [
        "engine.compile: Branching cannot be compiled"
    ]


def test_without_a_cpp_compiler_blocks_run_uncompiled_and_it_is_logged_once(caplog, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "none"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    blocks = nn.Sequential(Plain(), Plain())
    compiled, x = copy.deepcopy(blocks), torch.ones(2, 4)
    compile_blocks(compiled, ["0", "1"])
    with caplog.at_level(logging.WARNING, logger="internseg_ds"):
        assert torch.equal(compiled(x), blocks(x))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("internseg_ds")]
    assert len(ours) == 1 and "Plain cannot be compiled" in ours[0] and "ompiler" in ours[0], ours


def test_images_are_kept_by_the_draws_of_bernoulli():
    like, keep = torch.empty(1000, 1, 1), torch.tensor(0.7, dtype=torch.float64)
    torch.manual_seed(0)
    drawn = kept_images(like, keep)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.empty(1000, 1, 1).bernoulli_(0.7))
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.05)
    assert not torch.equal(drawn, kept_images(like, keep))
