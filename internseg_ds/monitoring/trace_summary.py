"""Where the time of training steps went, from a torch.profiler trace: by kind of work, and by part of the
model.

In: a trace of one rank as torch.profiler exports it (Chrome's trace event format), with the ranges that
`profiler.StepProfile` names. Out: shares of the steps' time that sum to 1, and a table of them. On a GPU
time is what its kernels take, or that it idles; on a CPU, what operations of the main thread take.
"""

import bisect
import heapq
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

MATMUL = "matrix products, convolutions"
ATTENTION = "attention"
ELEMENTWISE = "norms, elementwise, copies"
COMMUNICATION = "communication"
UPDATE = "optimizer update"
DATA = "waiting for data"
REST = "the rest"
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
    """What some time is spent on. fixed: operations inside are of this kind, too. busy: in an operation, and
    not between two."""

    part: str = ""
    kind: str = REST
    fixed: bool = False
    busy: bool = False


OF_AUTOGRAD = Context(part="backward")
"""Where nothing else is known: on other threads than the main one, which is in some range all the time."""

WORK = 0
COLLECTIVE = 1
IDLE = 2
"""Priorities of spans that compete for the same time: a collective counts only where nothing computes, idle
time only where nothing else runs."""

Event = Mapping[str, Any]
"""Of the trace: cat, name, ts and dur in microseconds, tid, args."""


class Slice(NamedTuple):
    """A stretch of a thread's time, in the trace's microseconds."""

    start: float
    end: float
    context: Context


class Span(NamedTuple):
    """Something that competes for the time from start to end; the lowest priority wins, then the earliest.
    part: "" for that of the main thread."""

    start: float
    end: float
    priority: int
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


@dataclass(frozen=True)
class _Trace:
    """events: those that have a duration. steps: the ranges "step N", in order. threads: of each thread that
    runs operations, its time. main: the thread that runs the steps. kernels: of the GPU, copies too."""

    events: Sequence[Event]
    steps: Sequence[Event]
    threads: Mapping[Any, list[Slice]]
    main: Any
    kernels: Sequence[Event]

    @classmethod
    def read(cls, trace: Event) -> "_Trace":
        """trace: as exported. Raises ValueError where it has no step."""
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
        by_thread: dict[Any, list[Event]] = defaultdict(list)
        for event in events:
            if event.get("cat") in ("cpu_op", "user_annotation"):
                by_thread[event["tid"]].append(event)
        forward_parts = _forward_parts(by_thread[main])
        threads = {
            thread: list(_slices(found, forward_parts, Context() if thread == main else OF_AUTOGRAD))
            for thread, found in by_thread.items()
        }
        kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        return cls(events, steps, threads, main, kernels)

    @property
    def main_slices(self) -> list[Slice]:
        return self.threads[self.main]

    def collectives(self) -> list[Span]:
        """On a GPU the kernels of NCCL; on a CPU the ranges that gloo's own threads name."""
        found = self.kernels or [
            event
            for event in self.events
            if event["tid"] != self.main and event.get("cat") == "user_annotation"
        ]
        return [
            Span(event["ts"], event["ts"] + event["dur"], COLLECTIVE, COMMUNICATION, "")
            for event in found
            if _COLLECTIVE.match(event["name"])
        ]


def break_down(trace: Event) -> Breakdown:
    """The steps of a trace, split up. Raises ValueError when it has none."""
    read = _Trace.read(trace)
    windows = [(step["ts"], step["ts"] + step["dur"]) for step in read.steps]
    total = sum(end - start for start, end in windows)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for owned in _owners(_gpu_spans(read) if read.kernels else _cpu_spans(read), read.main_slices):
        part = _column(owned.span.part or owned.main_part)
        spent[owned.span.kind, part] += _inside(owned.start, owned.end, windows)
    # of a step's range before its first part
    spent[REST, "agreeing"] += max(0.0, total - sum(spent.values()))
    communicating = sum(_inside(owned.start, owned.end, windows) for owned in _owners(read.collectives(), ()))
    return Breakdown(
        {key: value / total for key, value in spent.items() if value},
        {step["name"]: step["dur"] / 1e6 for step in read.steps},
        communicating / total,
        bool(read.kernels),
    )


def _gpu_spans(trace: _Trace) -> list[Span]:
    """The kernels; where none runs the GPU is idle, in the part that the main thread is in."""
    launches = {
        event["args"]["correlation"]: event
        for event in trace.events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    idle = [
        Span(start, end, IDLE, DATA if context.kind == DATA else REST, context.part)
        for start, end, context in trace.main_slices
    ]
    return [_kernel_span(kernel, launches, trace.threads) for kernel in trace.kernels] + idle


def _cpu_spans(trace: _Trace) -> list[Span]:
    """The main thread's operations; between them it waits for a collective where one runs."""
    operations = [
        Span(start, end, WORK if context.busy or context.kind == DATA else IDLE, context.kind, context.part)
        for start, end, context in trace.main_slices
    ]
    return operations + trace.collectives()


def summarise(trace: Event) -> str:
    """The table, and below it the seconds of each step and what the table rests on. Raises ValueError for a
    trace without steps."""
    found = break_down(trace)
    text = io.StringIO()
    Console(file=text, width=160).print(_table(found))
    lines = [line.rstrip() for line in text.getvalue().rstrip().splitlines()]
    seconds = ", ".join(f"{name} {value:.3f} s" for name, value in found.steps_s.items())
    return "\n".join([*lines, f"{seconds}. {_basis(found)}"])


def _table(found: Breakdown) -> Table:
    """Kinds of work down and parts of the step across, in % of the time of a step."""
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
    return table


def _basis(found: Breakdown) -> str:
    if not found.on_gpu:
        return (
            "Time is the main thread's; between operations: Python, autograd, DeepSpeed, waiting for the "
            "processor."
        )
    return (
        f"Time is the GPU's, by its kernels. Collectives ran for {found.collectives:.1%} of it; "
        f"{found.of_kind(COMMUNICATION):.1%} was not hidden behind other kernels."
    )


def _forward_parts(events: Iterable[Event]) -> dict[int, str]:
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
            # the last operation with a number makes the node
            parts[event["args"]["Sequence number"]] = names[1] if len(names) > 1 else "losses"
    return parts


def _slices(events: Iterable[Event], forward_parts: Mapping[int, str], outside: Context) -> Iterator[Slice]:
    """A thread's time by the innermost event, in order of time."""
    open_events: list[tuple[float, Context]] = []
    """(end, context) of the events that the cursor is in, the innermost last."""
    cursor = 0.0

    def close_until(time: float) -> Iterator[Slice]:
        nonlocal cursor
        while open_events and open_events[-1][0] <= time:
            end, context = open_events.pop()
            if end > cursor:
                yield Slice(cursor, end, context)
                cursor = end

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = event["ts"], event["ts"] + event["dur"]
        yield from close_until(start)
        around = outside
        if open_events:
            around_end, around = open_events[-1]
            if start > cursor:
                yield Slice(cursor, start, around)
            end = min(end, around_end)
        cursor = max(cursor, start)
        open_events.append((end, _entered(around, event, forward_parts)))
    yield from close_until(float("inf"))


def _entered(around: Context, event: Event, forward_parts: Mapping[int, str]) -> Context:
    """The context inside an event."""
    name = event["name"]
    is_collective = bool(_COLLECTIVE.match(name))
    if event["cat"] == "user_annotation" and not is_collective:
        return _entered_range(around, name)
    part = _backward_part(around.part, event, forward_parts)
    if is_collective:
        return Context(part, COMMUNICATION, fixed=True, busy=True)
    operation = bool(_OPERATION.match(name))
    if around.fixed:
        return replace(around, part=part, busy=operation or around.kind == COMMUNICATION)
    if _ATTENTION.search(name):
        return Context(part, ATTENTION, fixed=True, busy=True)
    if _MATMUL.match(name):
        return Context(part, MATMUL, fixed=True, busy=True)
    return Context(part, ELEMENTWISE if operation else REST, busy=operation)


def _entered_range(around: Context, name: str) -> Context:
    """The context inside a range that `profiler.StepProfile` names, or that somebody else does."""
    if name in _RANGES:
        return Context(name, _FIXED_KINDS.get(name, REST), name in _FIXED_KINDS)
    if name in ("backbone", "heads") and around.part == "forward":
        return replace(around, part=f"{name} forward")
    return around


def _backward_part(part: str, event: Event, forward_parts: Mapping[int, str]) -> str:
    """The part inside an operation; part: around it. In a backward pass, an autograd node belongs to the part
    whose forward pass made it."""
    args = event.get("args", {})
    if "backward" not in part or "Sequence number" not in args:
        return part
    if event["name"].startswith("autograd::engine::evaluate_function"):
        made_by = forward_parts.get(args["Sequence number"])
        return f"{made_by} backward" if made_by is not None else "backward"
    if not args.get("Fwd thread id") and part == "backbone backward":
        # an operation of a forward pass inside a backward pass: checkpointed work is done again
        return "backbone recomputed"
    return part


def _kernel_span(kernel: Event, launches: Mapping[int, Event], threads: Mapping[Any, list[Slice]]) -> Span:
    """kernel: an event of the GPU. Its kind and part are those of the operation that launched it."""
    name = kernel["name"]
    start, end = kernel["ts"], kernel["ts"] + kernel["dur"]
    launch = launches.get(kernel.get("args", {}).get("correlation"))
    context = _context_at(threads.get(launch["tid"], []), launch["ts"]) if launch is not None else OF_AUTOGRAD
    if _COLLECTIVE.match(name):
        return Span(start, end, COLLECTIVE, COMMUNICATION, context.part)
    # launched outside of torch's operations, or a copy: by its own name
    unknown = context.kind in (REST, DATA, COMMUNICATION)
    return Span(start, end, WORK, _kind_of_kernel(name) if unknown else context.kind, context.part)


def _kind_of_kernel(name: str) -> str:
    if _ATTENTION.search(name):
        return ATTENTION
    return MATMUL if _GEMM_KERNEL.search(name) else ELEMENTWISE


def _context_at(slices: list[Slice], time: float) -> Context:
    index = bisect.bisect_right(slices, time, key=lambda each: each.start) - 1
    return slices[index].context if index >= 0 and time < slices[index].end else OF_AUTOGRAD


class Owned(NamedTuple):
    """A stretch of time and the span that it goes to. main_part: what the main thread is in then."""

    start: float
    end: float
    span: Span
    main_part: str


def _owners(spans: Iterable[Span], main: Sequence[Slice]) -> Iterator[Owned]:
    """Gives each instant in which some span runs to one of them, in order of time."""
    by_start = sorted(spans, key=lambda span: span.start)
    times = sorted({time for span in by_start for time in (span.start, span.end)})
    # by priority, then start; the number breaks ties
    running: list[tuple[int, float, int, Span]] = []
    started = 0
    at_main = 0
    for start, end in itertools.pairwise(times):
        while started < len(by_start) and by_start[started].start <= start:
            span = by_start[started]
            heapq.heappush(running, (span.priority, span.start, started, span))
            started += 1
        while running and running[0][3].end <= start:
            heapq.heappop(running)
        while at_main < len(main) and main[at_main].end <= start:
            at_main += 1
        if running:
            main_part = main[at_main].context.part if at_main < len(main) else ""
            yield Owned(start, end, running[0][3], main_part)


def _inside(start: float, end: float, windows: Iterable[tuple[float, float]]) -> float:
    return sum(max(0.0, min(end, last) - max(start, first)) for first, last in windows)


def _column(part: str) -> str:
    return {"forward": "losses forward", "backward": "other backward", "": "agreeing"}.get(part, part)
