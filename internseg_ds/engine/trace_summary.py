"""Where the time of training steps went, from a torch.profiler trace: by kind of work, and by part of the model.

In: a trace of one rank as torch.profiler exports it (Chrome's trace event format), with the ranges that `profiling.StepProfile` names. Out: shares of the
steps' time that sum to 1, and a table of them. On a GPU time is what its kernels take, or that it idles; on a CPU, what operations of the main thread take.
"""

import bisect
import heapq
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

MATMUL, ATTENTION, ELEMENTWISE = "matrix products, convolutions", "attention", "norms, elementwise, copies"
COMMUNICATION, UPDATE, DATA, REST = "communication", "optimizer update", "waiting for data", "the rest"
KINDS = (MATMUL, ATTENTION, ELEMENTWISE, COMMUNICATION, UPDATE, DATA, REST)
PARTS = (
    "data",
    "backbone forward",
    "heads forward",
    "losses forward",
    "losses backward",
    "heads backward",
    "backbone recomputed",
    "backbone backward",
    "other backward",
    "update",
    "agreeing",
)

_COLLECTIVE = re.compile(r"c10d::|gloo:|nccl|record_param_comms", re.IGNORECASE)
_ATTENTION = re.compile(r"scaled_dot_product|flash|fmha|sdpa|_efficient_attention", re.IGNORECASE)
_MATMUL = re.compile(
    r"aten::(_?(add)?(mm|bmm)|baddbmm|matmul|linear|einsum|_scaled_mm|\w*conv\w*|mkldnn_linear\w*)$"
)
_GEMM_KERNEL = re.compile(r"gemm|cutlass|nvjet|wgrad|dgrad|conv\w*_kernel|implicit_con", re.IGNORECASE)
_OPERATION = re.compile(r"aten::|triton_|cpp_fused|CompiledFunction|Torch-Compiled")
_RANGES = ("data", "forward", "backward", "update", "agreeing")
_FIXED_KINDS = {"data": DATA, "update": UPDATE}


@dataclass(frozen=True)
class Context:
    """What some time is spent on. fixed: operations inside are of this kind, too. busy: in an operation, and not between two."""

    part: str = ""
    kind: str = REST
    fixed: bool = False
    busy: bool = False


OF_AUTOGRAD = Context(part="backward")
"""On other threads than the main one, which is in some range all the time, and where nothing else is known."""


class Slice(NamedTuple):
    """A stretch of a thread's time, in the trace's microseconds."""

    start: float
    end: float
    context: Context


class Span(NamedTuple):
    """Something that competes for the time from start to end; the lowest rank wins, then the earliest. part: "" for that of the main thread."""

    start: float
    end: float
    rank: int
    kind: str
    part: str


@dataclass(frozen=True)
class Breakdown:
    """shares: of the steps' time by (kind, part), sum 1. steps_s: seconds of each step by its name.
    collectives: share of the time with a collective under way."""

    shares: Mapping[tuple[str, str], float]
    steps_s: Mapping[str, float]
    collectives: float
    on_gpu: bool

    def of_kind(self, kind: str) -> float:
        return sum(share for (each, _), share in self.shares.items() if each == kind)

    def of_part(self, part: str) -> float:
        return sum(share for (_, each), share in self.shares.items() if each == part)


def break_down(trace: Mapping[str, Any]) -> Breakdown:
    """The steps of a trace, split up. Raises ValueError when it has none."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = sorted(
        (
            event
            for event in events
            if event.get("cat") == "user_annotation" and re.fullmatch(r"step \d+", event["name"])
        ),
        key=lambda event: event["ts"],
    )
    if not steps:
        raise ValueError("the trace holds no range 'step N'")
    main = steps[0]["tid"]
    by_thread: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            by_thread[event["tid"]].append(event)
    forward_parts = _forward_parts(by_thread[main])
    threads = {
        thread: list(_slices(found, forward_parts, Context() if thread == main else OF_AUTOGRAD))
        for thread, found in by_thread.items()
    }
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    collectives = [
        event
        for event in (kernels or events)
        if _COLLECTIVE.match(event["name"])
        and (kernels or (event["tid"] != main and event.get("cat") == "user_annotation"))
    ]
    if kernels:
        launches = {
            event["args"]["correlation"]: event
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        spans = [_kernel_span(kernel, launches, threads) for kernel in kernels]
        spans += [
            Span(start, end, 2, DATA if context.kind == DATA else REST, context.part)
            for start, end, context in threads[main]
        ]
    else:
        spans = [
            Span(start, end, 0 if context.busy or context.kind == DATA else 2, context.kind, context.part)
            for start, end, context in threads[main]
        ]
        spans += [
            Span(event["ts"], event["ts"] + event["dur"], 1, COMMUNICATION, "") for event in collectives
        ]
    windows = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for start, end, span, part in _owners(spans, threads[main]):
        spent[span.kind, _column(span.part or part)] += _inside(start, end, windows)
    total = sum(end - start for start, end in windows)
    spent[REST, "agreeing"] += max(
        0.0, total - sum(spent.values())
    )  # of a step's range before its first part
    communicating = [
        Span(event["ts"], event["ts"] + event["dur"], 0, COMMUNICATION, "") for event in collectives
    ]
    under_way = sum(_inside(start, end, windows) for start, end, _, _ in _owners(communicating, ()))
    return Breakdown(
        {key: value / total for key, value in spent.items() if value},
        {step["name"]: step["dur"] / 1e6 for step in steps},
        under_way / total,
        bool(kernels),
    )


def summarise(trace: Mapping[str, Any]) -> str:
    """The table, kinds of work down and parts of the step across, in % of the time of a step, and what it rests on."""
    found = break_down(trace)
    parts = [part for part in PARTS if found.of_part(part) > 0]
    table = Table("% of the time of a step", box=None, pad_edge=False)
    for part in parts:
        table.add_column(part.replace(" ", "\n"), justify="right")
    table.add_column("all", justify="right")
    rest = "GPU idle" if found.on_gpu else "between operations"
    for kind in KINDS:
        cells = [found.shares.get((kind, part), 0.0) for part in parts]
        table.add_row(
            rest if kind == REST else kind,
            *(f"{100 * share:.1f}" if share else "" for share in cells),
            f"{100 * sum(cells):.1f}",
        )
    table.add_row(
        "all",
        *(f"{100 * found.of_part(part):.1f}" for part in parts),
        f"{100 * sum(found.shares.values()):.1f}",
    )
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    seconds = ", ".join(f"{name} {value:.3f} s" for name, value in found.steps_s.items())
    where = (
        "Time is the GPU's, by its kernels."
        if found.on_gpu
        else "Time is the main thread's; between operations: Python, autograd, DeepSpeed, waiting for the processor."
    )
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    if found.on_gpu:
        where += f" Collectives ran for {found.collectives:.1%} of it; {found.of_kind(COMMUNICATION):.1%} was not hidden behind other kernels."
    return "\n".join([*lines, f"{seconds}. {where}"])


def _forward_parts(events: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Which part made the autograd node of a sequence number, from the forward passes of the main thread."""
    parts: dict[int, str] = {}
    ranges: list[tuple[float, str]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while ranges and ranges[-1][0] <= event["ts"]:
            ranges.pop()
        if event["cat"] == "user_annotation" and event["name"] in (*_RANGES, "backbone", "heads"):
            ranges.append((event["ts"] + event["dur"], event["name"]))
        names = [name for _, name in ranges]
        if names[:1] == ["forward"] and "Sequence number" in event.get("args", {}):
            parts[event["args"]["Sequence number"]] = (
                names[1] if len(names) > 1 else "losses"
            )  # the last operation with a number makes the node
    return parts


def _slices(
    events: Iterable[Mapping[str, Any]], forward_parts: Mapping[int, str], outside: Context
) -> Iterator[Slice]:
    """A thread's time by the innermost event, in order of time."""
    stack: list[tuple[float, Context]] = []
    cursor = 0.0
    for event in [*sorted(events, key=lambda event: (event["ts"], -event["dur"])), None]:
        start = event["ts"] if event is not None else float("inf")
        while stack and stack[-1][0] <= start:
            end, context = stack.pop()
            if end > cursor:
                yield Slice(cursor, end, context)
                cursor = end
        if event is None:
            return
        if stack and start > cursor:
            yield Slice(cursor, start, stack[-1][1])
        cursor = max(cursor, start)
        end = start + event["dur"]
        stack.append(
            (
                min(end, stack[-1][0]) if stack else end,
                _entered(stack[-1][1] if stack else outside, event, forward_parts),
            )
        )


def _entered(around: Context, event: Mapping[str, Any], forward_parts: Mapping[int, str]) -> Context:
    """The context inside an event."""
    name, args = event["name"], event.get("args", {})
    if event["cat"] == "user_annotation" and not _COLLECTIVE.match(name):
        if name in _RANGES:
            return Context(name, _FIXED_KINDS.get(name, REST), name in _FIXED_KINDS)
        return (
            replace(around, part=f"{name} forward")
            if name in ("backbone", "heads") and around.part == "forward"
            else around
        )
    part = around.part
    if "backward" in part and "Sequence number" in args:
        if name.startswith("autograd::engine::evaluate_function"):
            part = (
                f"{forward_parts[args['Sequence number']]} backward"
                if args["Sequence number"] in forward_parts
                else "backward"
            )
        elif (
            not args.get("Fwd thread id") and part == "backbone backward"
        ):  # a forward's number, in a backward: checkpointed work is done again
            part = "backbone recomputed"
    if _COLLECTIVE.match(name):
        return Context(part, COMMUNICATION, fixed=True, busy=True)
    operation = bool(_OPERATION.match(name))
    if around.fixed:
        return replace(around, part=part, busy=operation or around.kind == COMMUNICATION)
    if _ATTENTION.search(name):
        return Context(part, ATTENTION, fixed=True, busy=True)
    if _MATMUL.match(name):
        return Context(part, MATMUL, fixed=True, busy=True)
    return Context(part, ELEMENTWISE if operation else REST, busy=operation)


def _kernel_span(
    kernel: Mapping[str, Any], launches: Mapping[int, Mapping[str, Any]], threads: Mapping[Any, list[Slice]]
) -> Span:
    """kernel: an event of the GPU. Its kind and part are those of the operation that launched it."""
    start, end, name = kernel["ts"], kernel["ts"] + kernel["dur"], kernel["name"]
    launch = launches.get(kernel.get("args", {}).get("correlation"))
    context = _context_at(threads.get(launch["tid"], []), launch["ts"]) if launch is not None else OF_AUTOGRAD
    if _COLLECTIVE.match(name):
        return Span(start, end, 1, COMMUNICATION, context.part)
    kind = context.kind
    if kind in (REST, DATA, COMMUNICATION):  # launched outside of torch's operations, or a copy
        kind = ATTENTION if _ATTENTION.search(name) else MATMUL if _GEMM_KERNEL.search(name) else ELEMENTWISE
    return Span(start, end, 0, kind, context.part)


def _context_at(slices: list[Slice], time: float) -> Context:
    index = bisect.bisect_right(slices, time, key=lambda each: each.start) - 1
    return slices[index].context if index >= 0 and time < slices[index].end else OF_AUTOGRAD


def _owners(spans: Iterable[Span], main: Iterable[Slice]) -> Iterator[tuple[float, float, Span, str]]:
    """(start, end, who owns that time, the main thread's part then): each instant goes to one span."""
    spans = [*spans]
    starts = sorted(spans, key=lambda span: span.start)
    times = sorted({time for span in spans for time in (span.start, span.end)})
    main, at_main, waiting, index = [*main], 0, [], 0
    for start, end in itertools.pairwise(times):
        while index < len(starts) and starts[index].start <= start:
            span = starts[index]
            heapq.heappush(waiting, (span.rank, span.start, index, span))
            index += 1
        while waiting and waiting[0][3].end <= start:
            heapq.heappop(waiting)
        while at_main < len(main) and main[at_main].end <= start:
            at_main += 1
        if waiting:
            yield start, end, waiting[0][3], main[at_main].context.part if at_main < len(main) else ""


def _inside(start: float, end: float, windows: Iterable[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, last) - max(start, first)) for first, last in windows)


def _column(part: str) -> str:
    return {"forward": "losses forward", "backward": "other backward", "": "agreeing"}.get(part, part)
