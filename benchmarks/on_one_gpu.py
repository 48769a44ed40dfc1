"""Measures what one GPU of 80 or 141 GB can tell of this project, in minutes and without a network, in the
order of what is worth most.

    python benchmarks/on_one_gpu.py --minutes 8 --out DIR                 all parts, as far as the time goes
    python benchmarks/on_one_gpu.py --minutes 8 --out DIR --skip-done   goes on from what DIR/results.jsonl holds
    python benchmarks/on_one_gpu.py --rehearse --out DIR      on the CPU, at tiny sizes: does every part run?
    python benchmarks/on_one_gpu.py --report DIR      tables for docs/, and the planner's rates fitted to figures

Every result goes to DIR/results.jsonl at once, as a line of JSON with card, versions, commit and settings,
and the planned figure beside it where there is a plan. DIR/results.md has them as tables, also where the
visit was cut short; DIR/log.txt what the parts printed. Each part runs in processes of its own: a crash, a
hang, or memory that runs out costs only that part. Ends with 0 when every part was measured, 75 when time ran
out or SIGTERM came, 1 when a part failed or lacks a package.
"""

import argparse
import math
import os
import signal
import sys
import time
from pathlib import Path

from gpu_visit.jobs import BY_NAME, JOBS, PARTS
from gpu_visit.results import Line, Results, identity, read
from gpu_visit.supervisor import UNFINISHED, Stopped, Supervisor
from gpu_visit.table import brief, markdown

TABLE_S = 3.0
"""Kept of the budget for the table, and for ending what runs."""


def options() -> argparse.Namespace:
    listed = "\n".join(
        f"  {letter}  {what}: {', '.join(job.name for job in JOBS if job.part == letter)}"
        for letter, what in PARTS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of results.jsonl, results.md, log.txt"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)g)")
    parser.add_argument("--parts", default=",".join(PARTS), help="letters, such as a,c,d (default: all)")
    parser.add_argument(
        "--skip-done",
        action="store_true",
        help="leave out what results.jsonl of DIR, or --earlier, holds for this card",
    )
    parser.add_argument(
        "--earlier",
        type=Path,
        action="append",
        default=[],
        metavar="JSONL",
        help="results of an earlier call, for --skip-done and the tables",
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="for large files of part h (default: /dev/shm or the temporary folder, whichever has room)",
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        type=Path,
        metavar="JSON",
        help="of the trainings (default: what fits by the plan)",
    )
    parser.add_argument("--commit", help="of the code, where there is no git")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="only reads DIR/results.jsonl (or such a file) and prints tables and fitted rates",
    )
    parser.add_argument("--job", choices=BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    parser.add_argument("--go-on", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = [letter.strip() for letter in args.parts.split(",") if letter.strip()]
    if unknown := [letter for letter in args.parts if letter not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    if args.out is None and args.report is None:
        parser.error("--out DIR says where results go")
    if not args.parts:
        parser.error(f"--parts names none; the parts are {', '.join(PARTS)}")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes {args.minutes:g} must be above 0")
    for option, path in (
        ("--report", args.report),
        ("--deepspeed_config", args.deepspeed_config),
        *(("--earlier", path) for path in args.earlier),
    ):
        if path is not None and not path.exists():
            parser.error(f"{option} {path}: there is no such file")
    if args.report is None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out} can be no folder: {error.strerror}")
    return args


def main() -> int:
    began, args = time.monotonic(), options()
    if args.report is not None:
        from gpu_visit.report import report

        print(report(read(args.report / "results.jsonl" if args.report.is_dir() else args.report)))
        return 0
    if args.commit:
        os.environ["ON_ONE_GPU_COMMIT"] = args.commit
    results = Results(
        args.out.resolve(), rehearsal=args.rehearse, earlier=[path.resolve() for path in args.earlier]
    )
    if args.job is not None:
        return work(args, results)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    more = [
        word
        for name in ("scratch", "deepspeed_config")
        if getattr(args, name)
        for word in (f"--{name}", str(getattr(args, name).resolve()))
    ]
    supervisor = Supervisor(
        results, ends=began + 60 * args.minutes - TABLE_S, rehearse=args.rehearse, more=more, say=say
    )
    print(
        ", ".join(f"{name} {value}" for name, value in identity(args.rehearse).items() if value), flush=True
    )
    jobs = [job for job in JOBS if job.part in args.parts]
    for job in jobs:
        if job.missing:
            print(f"cannot run: {job.part}, {job.name}: {job.missing}", flush=True)
    start, whole = len(read(results.path)), False
    try:
        whole = supervisor.run(jobs, skip_done=args.skip_done)
    except Stopped:
        print("stopped by a signal; the table is of what was measured", flush=True)
    finally:
        text = markdown(results.lines())
        (args.out / "results.md").write_text(text, encoding="utf-8")
        print(f"\n{text}", flush=True)
    if whole:
        return 0
    return (
        1
        if {line["status"] for line in read(results.path)[start:]}
        & {"failed", "crashed", "missing", "timed out"}
        else UNFINISHED
    )


def work(args: argparse.Namespace, results: Results) -> int:
    """One job, in this process."""
    from gpu_visit.visit import OutOfTime, Spoilt, Visit

    job = BY_NAME[args.job]
    visit = Visit(
        results,
        job.part,
        job.name,
        args.rehearse,
        time.monotonic() + args.seconds,
        args.scratch,
        results.had(failed=args.go_on) if args.skip_done or args.go_on else set(),
        args.deepspeed_config,
    )
    try:
        job.run(visit)
    except (OutOfTime, Spoilt) as error:
        print(f"unfinished: {type(error).__name__} {error}", flush=True)
        return UNFINISHED
    return 0


def say(line: Line) -> None:
    print(brief(line), flush=True)


def _stop(*_: object) -> None:
    # what ends the jobs and writes the table is not to be ended itself
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
