"""Every policy of activation checkpointing gives the numbers of none, keeps what it says, and computes again
what it says."""

import pytest
import torch
from mmseg.models import build_backbone
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from internseg_ds.models.activation_checkpointing import KEPT, checkpoint_calls, run_block, set_recomputation
from internseg_ds.models.intern_vit.intern_vit_6b import InternViT6B

POLICIES = ["none", "blocks", 1, 2, 3, "all_but_matmuls"]
SMALL = dict(
    type="InternViT6B",
    embed_dim=24,
    depth=4,
    num_heads=3,
    patch_size=14,
    img_size=56,
    out_indices=[0, 1, 2, 3],
    with_fpn=True,
    use_flash_attn=False,
)


def vit(policy: str | int, **arguments: object) -> InternViT6B:
    torch.manual_seed(0)
    backbone = build_backbone({**SMALL, "drop_path_rate": 0.5, **arguments}).train()
    with torch.no_grad():
        for param in backbone.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    set_recomputation(backbone, policy)
    return backbone


def losses_and_gradients(backbone: InternViT6B) -> list[torch.Tensor]:
    torch.manual_seed(7)
    loss = sum(feature.square().mean() for feature in backbone(torch.randn(4, 3, 56, 56)))
    loss.backward()
    return [loss.detach(), *(param.grad for param in backbone.parameters() if param.grad is not None)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "variant",
    [{}, {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}, {"init_values": 0}],
    ids=str,
)
def test_all_policies_give_equal_losses_and_gradients_to_the_last_bit(variant, frozen):
    wanted = losses_and_gradients(vit("none", freeze_vit=frozen, **variant))
    for policy in POLICIES[1:]:
        got = losses_and_gradients(vit(policy, freeze_vit=frozen, **variant))
        assert len(got) == len(wanted) and all(torch.equal(*pair) for pair in zip(got, wanted)), policy


class Allocations(TorchDispatchMode):
    """Every storage that an operation returns inside a `with` block, apart from a model's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {param.untyped_storage()._cdata for param in model.parameters()}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def kept_bytes(policy: str | int) -> int:
    """Bytes that a forward pass leaves for the backward pass."""
    backbone = vit(policy, embed_dim=96, depth=8, with_fpn=False, out_indices=[7], drop_path_rate=0.0)
    with Allocations(backbone) as allocations:
        features = backbone(torch.randn(2, 3, 56, 56))
    kept = allocations.alive()
    del features
    assert allocations.alive() < kept / 100  # nothing holds itself
    return kept


def test_the_more_is_recomputed_the_less_is_kept():
    sizes = [kept_bytes(policy) for policy in ("none", 3, 2, "blocks")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), sizes
    tokens = 4 * 2 * 17 * 96  # bytes of (2, 1 + 4 x 4, 96) floats
    per_block = [(size - sizes[-1]) / tokens / 8 for size in (sizes[0], kept_bytes("all_but_matmuls"))]
    # beside the input; CPUs' norms, which are not fused, keep another result each
    assert per_block == pytest.approx([19 + 4, 10], abs=0.1)


def recomputed_flops(policy: str | int) -> int:
    with torch.device("meta"):
        backbone = build_backbone(SMALL).train()
    set_recomputation(backbone, policy)
    loss = sum(feature.sum() for feature in backbone(torch.empty(2, 3, 56, 56, device="meta")))
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


def test_what_is_computed_again_costs_what_the_policy_says():
    plain, block = recomputed_flops("none"), (recomputed_flops("blocks") - recomputed_flops("none")) / 4
    assert block > 0 and [recomputed_flops(policy) - plain for policy in (1, 2, 3, "all_but_matmuls")] == [
        4 * block,
        2 * block,
        2 * block,
        0,
    ]


@pytest.mark.parametrize("policy", ["none", "blocks", "all_but_matmuls"])
@pytest.mark.parametrize("of_a_library", [False, True])
def test_blocks_that_no_gradient_goes_through_run_without_autograd_and_once(policy, of_a_library):
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(4)]
    blocks[0].requires_grad_(False)
    blocks[1].requires_grad_(False)
    blocks[3].requires_grad_(False)  # behind one that trains: its input needs a gradient
    runs: list[tuple[int, bool]] = []
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, __, index=index: runs.append((index, torch.is_grad_enabled()))
        )
    if of_a_library:
        checkpoint_calls(blocks)
    x = torch.randn(3, 4)
    for index, block in enumerate(blocks):
        block.recomputation = policy
        x = block(x) if of_a_library else run_block(block, x, index=index, recomputation=policy)
    x.sum().backward()
    first = [(0, False), (1, False), (2, True), (3, True)]
    assert runs == first + ([(3, True), (2, True)] if policy != "none" else [])
    assert all(param.grad is not None for param in blocks[2].parameters())


@pytest.mark.parametrize("value", ["some", 0, -1, True, 1.5, None])
def test_what_is_no_policy_is_refused(value):
    with pytest.raises(ValueError, match="'none', 'blocks', 'all_but_matmuls'"):
        set_recomputation(vit("none"), value)


def test_a_model_without_checkpointing_is_refused():
    with pytest.raises(ValueError, match="activation checkpointing"):
        set_recomputation(torch.nn.Linear(2, 2), "blocks")


class ChangesItsProduct(nn.Module):
    """Reads the result of a matrix product, and changes it in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        product = self.linear(x)
        gate = product.sum(-1, keepdim=True)
        product.mul_(2)
        return x + product + gate * x


def test_a_product_that_is_read_and_then_changed_in_place_is_an_error_and_no_wrong_gradient():
    block, x = ChangesItsProduct(), torch.randn(3, 4, requires_grad=True)
    run_block(block, x, index=0, recomputation="blocks").sum().backward()
    with pytest.raises(RuntimeError, match=r"all_but_matmuls.*'blocks'"):
        run_block(block, x, index=0, recomputation="all_but_matmuls").sum().backward()


# made of operations that are kept themselves, or made for other devices, or called by nothing here
NOT_KEPT = {
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_native_multi_head_attention",
    "aten::_triton_multi_head_attention",
    "aten::_triton_scaled_dot_attention",
    "aten::_cudnn_attention_forward",
    "aten::_efficient_attention_forward",
    "aten::_flash_attention_forward",
    "aten::_flash_attention_forward_no_dropout_inplace",
}


def test_the_result_of_every_attention_that_torch_has_is_kept():
    """A new one would be computed twice under all_but_matmuls. flash-attn's packages, which are not here,
    name theirs by version."""
    names = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if "attention" in schema.name and "backward" not in schema.name
    }
    assert {name for name in names if name.startswith("aten::")} <= KEPT | NOT_KEPT
    assert {
        "flash_attn::_flash_attn_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
    } <= KEPT
