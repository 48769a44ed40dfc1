import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from internseg_ds.models.sampling import deformable_attention_torch
from internseg_ds.models.sampling.deformable_attention import DeformableAttention, attend
from internseg_ds.models.sampling.deformable_attention_operator import deformable_attention, implementation
from tests.models.sampling.deformable_attention_reference import attention_by_loops, with_gradients

SHAPES = [(3, 5), (6, 4), (2, 2)]
TOKENS = sum(height * width for height, width in SHAPES)


def inputs(
    batch: int = 2, queries: int = 7, heads: int = 2, width: int = 3, points: int = 4, dtype=torch.float64
):
    torch.manual_seed(0)
    value = torch.randn(batch, TOKENS, heads, width, dtype=dtype, requires_grad=True)
    # some outside
    locations = (
        torch.rand(batch, queries, heads, len(SHAPES), points, 2, dtype=dtype) * 1.4 - 0.2
    ).requires_grad_()
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=dtype, requires_grad=True)
    return value, locations, weights


def test_samples_and_gradients_are_those_of_an_independent_loop():
    value, locations, weights = inputs()
    grad = torch.randn(2, 7, 6, dtype=torch.float64)
    for ours, wanted in zip(
        *(
            with_gradients(run, value, SHAPES, locations, weights, grad)
            for run in (attend, attention_by_loops)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted)


def test_gradients_are_those_of_finite_differences():
    value, locations, weights = inputs(batch=1, queries=2, width=2, points=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: attend(tensors[0], SHAPES, *tensors[1:]), (value, locations, weights)
    )


def test_samples_taken_a_few_queries_at_a_time_are_the_same_and_so_are_gradients(monkeypatch):
    value, locations, weights = inputs(queries=150, width=48)
    grad, results = torch.randn(2, 150, 96, dtype=torch.float64), []
    for limit in (2**26, 30_000):  # all; 39 queries of 150 at a time
        monkeypatch.setattr(deformable_attention_torch, "SAMPLED_AT_ONCE", limit)
        results.append(with_gradients(attend, value, SHAPES, locations, weights, grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_backward_pass_keeps_the_inputs_only():
    tensors, kept = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        attend(tensors[0], SHAPES, *tensors[1:])
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in tensors} and len(
        kept
    ) == 3


def test_bf16_values_are_sampled_at_exact_locations_and_summed_in_fp32():
    value, locations, weights = (tensor.detach() for tensor in inputs(dtype=torch.float32))
    grad = torch.randn(2, 7, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(attend, value.bfloat16(), SHAPES, locations, weights, grad)
    exact = with_gradients(
        attend, value.bfloat16().double(), SHAPES, locations.double(), weights.double(), grad.double()
    )
    assert [tensor.dtype for tensor in found] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=2**-8 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4
        )


def test_torch_finds_schema_fake_and_gradient_consistent():
    value, locations, weights = inputs(dtype=torch.float32)
    torch.library.opcheck(
        deformable_attention,
        (value, locations, weights, [side for shape in SHAPES for side in shape]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_the_flop_counter_knows_both_passes_on_the_meta_device():
    tensors = [tensor.detach().to("meta").requires_grad_() for tensor in inputs()]
    corners = 2 * 7 * 2 * 3 * 4 * 3 * 4  # images x queries x heads x maps x points x channels x corners
    for factor in (2, 4):
        with FlopCounterMode(display=False) as counter:
            if factor == 2:
                out = attend(tensors[0], SHAPES, *tensors[1:])
            else:
                out.sum().backward()
        assert counter.get_total_flops() == factor * corners


@pytest.mark.parametrize(
    ("dtype", "deterministic", "chosen"),
    [(torch.bfloat16, False, "triton"), (torch.bfloat16, True, "torch"), (torch.float64, False, "torch")],
)
def test_gpus_run_triton_but_for_fp64_and_where_deterministic_algorithms_are_asked_for(
    dtype: torch.dtype, deterministic: bool, chosen: str
):
    pytest.importorskip("triton")
    with FakeTensorMode():  # tensors that say they are on a GPU
        tensors = [torch.empty(1, 2, dtype=dtype, device="cuda") for _ in range(3)]
        # as launch/train.py --deterministic does
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            assert (
                implementation(*tensors).__name__
                == f"internseg_ds.models.sampling.deformable_attention_{chosen}"
            )
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_batch_without_queries_and_one_without_images_are_empty():
    for cut in ({"queries": 0}, {"batch": 0}):
        tensors = inputs(**cut)
        out = attend(tensors[0], SHAPES, *tensors[1:])
        assert out.numel() == 0
        assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (2, 44, 2, 3)}, r"the value .*must be \(b, 43, heads, c\)"),
        ({"weights": (2, 7, 2, 2, 4)}, r"the weights .*must be \(2, queries, 2, 3, points\)"),
        ({"locations": (2, 7, 2, 3, 4, 3)}, r"the locations .*must be \(2, 7, 2, 3, 4, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str):
    shapes = {"value": (2, 43, 2, 3), "locations": (2, 7, 2, 3, 4, 2), "weights": (2, 7, 2, 3, 4)} | change
    value, locations, weights = (torch.zeros(shape) for shape in shapes.values())
    with pytest.raises(ValueError, match=message):
        attend(value, SHAPES, locations, weights)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_module_is_mmcvs(batch_first):
    torch.manual_seed(0)
    arguments = dict(embed_dims=12, num_heads=2, num_levels=3, dropout=0.0, batch_first=batch_first)
    ours, theirs = (kind(**arguments) for kind in (DeformableAttention, MultiScaleDeformableAttention))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.sampling_offsets.bias, theirs.sampling_offsets.bias)
    for param in ours.parameters():
        torch.nn.init.normal_(param, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    query, position = torch.randn(TOKENS, 2, 12), torch.randn(TOKENS, 2, 12)
    if batch_first:
        query, position = query.transpose(0, 1), position.transpose(0, 1)
    points = torch.rand(2, TOKENS, 3, 2)
    shapes = torch.tensor(SHAPES)
    expected = theirs(
        query, query_pos=position, reference_points=points, spatial_shapes=shapes, level_start_index=None
    )
    torch.testing.assert_close(
        ours(query, query_pos=position, reference_points=points, spatial_shapes=SHAPES),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
