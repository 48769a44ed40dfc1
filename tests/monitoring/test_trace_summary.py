"""On traces made by hand, whose shares are known; times are in microseconds."""

import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from internseg_ds.monitoring.trace_summary import (
    ATTENTION,
    COMMUNICATION,
    DATA,
    ELEMENTWISE,
    MATMUL,
    REST,
    UPDATE,
    break_down,
    summarise,
)


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def span(name: str, ts: float, dur: float) -> dict:
    return event("user_annotation", name, ts, dur)


ON_CPU = [
    span("step 5", 1000, 100),
    span("data", 1000, 10),
    event("cpu_op", "aten::stack", 1002, 5),
    span("forward", 1010, 30),
    span("backbone", 1010, 10),
    event("cpu_op", "aten::linear", 1011, 8, **{"Sequence number": 7}),
    event("cpu_op", "aten::copy_", 1012, 2, **{"Sequence number": 7}),
    span("heads", 1020, 10),
    event("cpu_op", "aten::conv2d", 1020, 10, **{"Sequence number": 8}),
    event("cpu_op", "aten::log_softmax", 1030, 6, **{"Sequence number": 9}),
    span("backward", 1040, 40),
    event(
        "cpu_op",
        "autograd::engine::evaluate_function: LogSoftmaxBackward0",
        1040,
        5,
        **{"Sequence number": 9, "Fwd thread id": 1},
    ),
    event("cpu_op", "aten::_log_softmax_backward_data", 1040, 5),
    event(
        "cpu_op",
        "autograd::engine::evaluate_function: ConvolutionBackward0",
        1045,
        10,
        **{"Sequence number": 8, "Fwd thread id": 1},
    ),
    event("cpu_op", "aten::convolution_backward", 1045, 10),
    event(
        "cpu_op",
        "autograd::engine::evaluate_function: AddmmBackward0",
        1055,
        20,
        **{"Sequence number": 7, "Fwd thread id": 1},
    ),
    event("cpu_op", "aten::scaled_dot_product_attention", 1055, 4, **{"Sequence number": 31}),
    event("cpu_op", "aten::bmm", 1056, 2, **{"Sequence number": 31}),
    event("cpu_op", "aten::mm", 1060, 10),
    event("cpu_op", "c10d::allreduce_", 1075, 1),
    event("user_annotation", "gloo:all_reduce", 1074, 5, tid=2),
    span("update", 1080, 15),
    event("cpu_op", "aten::sqrt", 1081, 3),
    event("user_annotation", "gloo:all_reduce", 1083, 4, tid=2),
    span("agreeing", 1095, 5),
    event("cpu_op", "aten::mm", 1100, 500),  # an evaluation
]


def test_a_cpus_time_goes_to_its_main_threads_operations_and_its_gaps_to_the_collectives_that_run_then():
    found = break_down({"traceEvents": ON_CPU})
    percent = {key: round(100 * share, 6) for key, share in found.shares.items()}
    assert percent == {
        (DATA, "data"): 10,
        (MATMUL, "backbone forward"): 8,
        (REST, "backbone forward"): 2,
        (MATMUL, "heads forward"): 10,
        (ELEMENTWISE, "losses forward"): 6,
        (REST, "losses forward"): 4,
        (ELEMENTWISE, "losses backward"): 5,
        (MATMUL, "heads backward"): 10,
        (ATTENTION, "backbone recomputed"): 4,
        (MATMUL, "backbone backward"): 10,
        (COMMUNICATION, "backbone backward"): 1,
        (REST, "backbone backward"): 5,
        (COMMUNICATION, "other backward"): 4,
        (REST, "other backward"): 1,
        (UPDATE, "update"): 12,
        (COMMUNICATION, "update"): 3,
        (REST, "agreeing"): 5,
    }
    assert found.steps_s == {"step 5": pytest.approx(1e-4)} and not found.on_gpu


def on_gpu() -> list[dict]:
    main = [
        span("step 5", 0, 100),
        span("data", 0, 10),
        span("forward", 10, 20),
        span("backbone", 10, 20),
        event("cpu_op", "aten::addmm", 11, 2, **{"Sequence number": 7}),
        event("cpu_op", "aten::add", 14, 2, **{"Sequence number": 8}),
        span("backward", 30, 20),
        span("update", 50, 50),
    ]
    autograd = [
        event(
            "cpu_op",
            "autograd::engine::evaluate_function: AddmmBackward0",
            32,
            9,
            tid=3,
            **{"Sequence number": 7, "Fwd thread id": 1},
        ),
        event("cpu_op", "aten::mm", 33, 2, tid=3),
        event("cpu_op", "aten::empty", 30, 1, tid=3),
    ]
    launches = [(12, 1), (15, 1), (34, 3), (36, 3), (31, 3), (52, 1), (5, 1), (38, 3)]
    launched = [
        event("cuda_runtime", "cudaLaunchKernel", ts, 1, tid=tid, correlation=index)
        for index, (ts, tid) in enumerate(launches)
    ]
    kernels = [
        ("nvjet_tst", 15, 10),
        ("vectorized_elementwise_kernel", 25, 5),
        ("nvjet_tst", 40, 20),
        ("ncclDevKernel_ReduceScatter", 38, 32),
        ("flash_fwd_kernel", 75, 5),
        ("multi_tensor_apply_kernel", 80, 10),
        ("Memcpy HtoD", 8, 2),
        ("fused_kernel", 35, 1),
    ]
    return (
        main
        + autograd
        + launched
        + [
            event(
                "gpu_memcpy" if name.startswith("Mem") else "kernel", name, ts, dur, tid=7, correlation=index
            )
            for index, (name, ts, dur) in enumerate(kernels)
        ]
    )


def test_a_gpus_time_goes_to_its_kernels_by_what_launched_them_and_the_rest_is_idle():
    found = break_down({"traceEvents": on_gpu()})
    percent = {key: round(100 * share, 6) for key, share in found.shares.items()}
    assert percent == {
        (DATA, "data"): 8,
        (ELEMENTWISE, "data"): 2,
        (REST, "backbone forward"): 5,
        (MATMUL, "backbone forward"): 10,
        (ELEMENTWISE, "backbone forward"): 5,
        (REST, "other backward"): 7,
        (ELEMENTWISE, "backbone backward"): 1,
        (MATMUL, "backbone backward"): 20,
        (COMMUNICATION, "backbone backward"): 12,
        (ATTENTION, "other backward"): 5,
        (UPDATE, "update"): 10,
        (REST, "update"): 15,
    }
    assert found.collectives == pytest.approx(0.32)
    assert re.search(r"Collectives.* 32\.0%.* 12\.0%", summarise({"traceEvents": on_gpu()}))


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no range 'step N'"):
        break_down({"traceEvents": []})


def test_the_backward_of_a_real_trace_is_told_by_what_its_forward_belonged_to(tmp_path):
    weight, x = torch.randn(400, 400, requires_grad=True), torch.randn(400, 400)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step 1"):
        with record_function("forward"):
            with record_function("backbone"):
                scaled = (x + weight).tanh()
            with record_function("heads"):
                out = scaled @ weight
            loss = out.exp().sum()
        with record_function("backward"):
            loss.backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = break_down(json.loads((tmp_path / "trace.json").read_text()))
    assert sum(found.shares.values()) == pytest.approx(1)
    multiplied = {part for kind, part in found.shares if kind == MATMUL}
    assert multiplied == {"heads forward", "heads backward"}
    assert found.of_part("backbone backward") > 0 and found.of_part("losses backward") > 0
