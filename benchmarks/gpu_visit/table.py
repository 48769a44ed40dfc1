"""results.jsonl for the eye: a line for the console, and the tables of results.md."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_visit.jobs import PARTS
from gpu_visit.results import Line

STOPPED = ("crashed", "timed out", "missing", "no time", "unfinished", "with failures")
HIDDEN = ("text",)


def brief(line: Line) -> str:
    """One line of the console."""
    told = " ".join(
        filter(
            None,
            [
                line["part"],
                f"{line['job']}:" if "name" in line else line["job"],
                line.get("name", ""),
                words(line.get("settings", {})),
            ],
        )
    )
    found = words(line.get("figures", {})) if line["status"] == "measured" else line.get("why", "")
    planned = (
        f"   (planned: {words(line['planned'])})"
        if line.get("planned") and line["status"] == "measured"
        else ""
    )
    return (
        f"{line['time'][11:]} {told} - "
        f"{line['status']}{': ' * bool(found)}{' '.join(str(found).split())[:400]}{planned}"
    )


def words(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {number(value)}"
        for name, value in values.items()
        if name not in HIDDEN and value is not None and not isinstance(value, Mapping)
    )


def number(value: Any) -> str:
    """Four digits, and no exponent for what is large."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return str(value)


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last result of each name and settings of a job, in the order of their first; of a job's own lines,
    the last of each job."""
    found: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        found[line["job"], line.get("name", ""), str(sorted(line.get("settings", {}).items(), key=str))] = (
            line
        )
    return list(found.values())


def ceiling(lines: Iterable[Line], format_: str = "bf16") -> float | None:
    """TFLOP/s of the fastest product of this format that was measured; None where there is none."""
    return max(
        (
            line["figures"]["tflops"]
            for line in lines
            if line.get("name") == "matrix product"
            and line["status"] == "measured"
            and line["settings"]["format"] == format_
        ),
        default=None,
    )


def markdown(lines: Sequence[Line]) -> str:
    """All tables: what the measurements rest on, steps beside their plans, every other result by its name,
    profiles, and what did not run."""
    if not lines:
        return "# Measured on one GPU\n\nNothing was measured.\n"
    lines = latest(lines)
    parts = ["# Measured on one GPU", _rests_on(lines), *_steps(lines)]
    for part, what in PARTS.items():
        rows = [
            line
            for line in lines
            if line["part"] == part
            and "name" in line
            and line["name"] not in ("training step", "profile", "start")
        ]
        if rows:
            parts += [f"## {part}. {what}", *_by_name(rows)]
    parts += _profiles(lines)
    jobs: dict[str, Line] = {}
    for line in lines:
        if "name" not in line:
            jobs[line["job"]] = line
    if stopped := [line for line in jobs.values() if line["status"] in STOPPED]:
        rows = [(line["part"], line["job"], line["status"], line.get("why", "")) for line in stopped]
        parts += ["## What did not come to its end", table(("part", "job", "what", "why"), rows)]
    return "\n\n".join(parts) + "\n"


def _rests_on(lines: Sequence[Line]) -> str:
    last = lines[-1]
    said = ", ".join(
        f"{name} {last[name]}"
        for name in ("card", "driver", "torch", "triton", "deepspeed", "python", "commit")
        if last.get(name)
    )
    times = sorted(line["time"] for line in lines)
    commits = sorted({line["commit"] for line in lines})
    return (
        f"{said}; {times[0]} to {times[-1]}"
        + (f"; of several commits: {', '.join(commits)}" if len(commits) > 1 else "")
        + (
            "\n\n**A rehearsal on a CPU at tiny sizes: no figure means anything.**"
            if last["rehearsal"]
            else ""
        )
    )


def _steps(lines: Sequence[Line]) -> list[str]:
    rows, top = [], ceiling(lines)
    for line in lines:
        if line.get("name") != "training step":
            continue
        settings, figures, planned = line["settings"], line.get("figures", {}), line.get("planned", {})
        reached = figures.get("model_tflops")
        rows.append(
            (
                settings["config"],
                settings["micro_batch"],
                settings["recomputation"],
                settings["heads"],
                settings["ds_config"],
                *(number(figures[name]) if name in figures else "" for name in ("step_s", "images_per_s")),
                number(planned.get("images_per_s", "")),
                f"{100 * reached / top:.1f}" if reached and top else "",
                number(reached) if reached else "",
                *(
                    number(figures[name]) if figures.get(name) is not None else ""
                    for name in ("peak_gib", "reserved_gib")
                ),
                number(planned.get("tensors_gib", "")),
                "" if line["status"] == "measured" else f"{line['status']}: {line.get('why', '')}"[:120],
            )
        )
    if not rows:
        return []
    said = (
        f"MFU is relative to {top:.0f} TFLOP/s, the fastest bf16 product that was measured."
        if top
        else "MFU is missing, since no ceiling was measured (part b)."
    )
    head = (
        "config",
        "images",
        "recomputed",
        "heads",
        "ds_config",
        "s/step",
        "images/s",
        "planned",
        "MFU %",
        "TFLOP/s",
        "peak GiB",
        "reserved",
        "planned",
        "",
    )
    return [
        "## Training steps",
        table(head, rows),
        said + " Peak: of torch's tensors, beside those of the plan (without context and fragmentation).",
    ]


def _by_name(rows: Sequence[Line]) -> list[str]:
    """A table for each name; columns are what its lines have."""
    by_name: dict[str, list[Line]] = defaultdict(list)
    for line in rows:
        by_name["tests" if "::" in line["name"] else line["name"]].append(line)
    parts = []
    for name, group in by_name.items():
        if name == "tests":
            counts = {
                status: sum(line["status"] == status for line in group)
                for status in dict.fromkeys(line["status"] for line in group)
            }
            parts.append(", ".join(f"{count} {status}" for status, count in counts.items()))
            other = [
                (line["name"], line["status"], line.get("why", "")[-300:])
                for line in group
                if line["status"] != "passed"
            ]
            parts += [table(("test", "", "why"), other)] * bool(other)
            continue
        settings, figures, planned = (
            [
                *dict.fromkeys(
                    key
                    for line in group
                    for key, value in line.get(where, {}).items()
                    if key not in HIDDEN and not isinstance(value, Mapping)
                )
            ]
            for where in ("settings", "figures", "planned")
        )
        status = any(line["status"] != "measured" for line in group)
        head = (*settings, *figures, *(f"planned {key}" for key in planned), *["what"] * status)
        parts.append(
            f"**{name}**\n\n"
            + table(
                head,
                [
                    (
                        *(number(line.get("settings", {}).get(key, "")) for key in settings),
                        *(number(line.get("figures", {}).get(key, "")) for key in figures),
                        *(number(line.get("planned", {}).get(key, "")) for key in planned),
                        *(
                            []
                            if not status
                            else [
                                ""
                                if line["status"] == "measured"
                                else f"{line['status']}: {line.get('why', '')}"[:200]
                            ]
                        ),
                    )
                    for line in group
                ],
            )
        )
    return parts


def _profiles(lines: Sequence[Line]) -> list[str]:
    parts = []
    for line in lines:
        if line.get("name") != "profile" or line["status"] != "measured":
            continue
        figures = line["figures"]
        parts.append(f"## Profile: {words(line['settings'])}")
        total = sum(figures["kernels_ms"].values())
        if total:
            idle = max(0.0, 1e3 * figures["profiled_step_s"] - total)
            rows = [
                (kind, f"{ms:.2f}", f"{ms / 10 / figures['profiled_step_s']:.1f}")
                for kind, ms in [*figures["kernels_ms"].items(), ("idle", idle)]
            ]
            parts.append(table(("kernels", "ms a step", "%"), rows))
        parts.append(f"```\n{figures['text']}\n```")
    return parts


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """In Markdown."""

    def cells(values: Sequence[Any]) -> str:
        return "| " + " | ".join(" ".join(str(value).split()).replace("|", "/") for value in values) + " |"

    return "\n".join([cells(head), "|" + "---|" * len(head), *map(cells, rows)])
