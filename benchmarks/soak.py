"""A long training under faults drawn at random, held against the same training without any: is anything lost?

    python benchmarks/soak.py --out DIR                 5,000 steps, a save each 50, an evaluation each 500, a fault
                                                        a minute; some 100 minutes on 2 cores
    python benchmarks/soak.py --out DIR --steps 600     shorter
    python benchmarks/soak.py --out DIR --report        the table and the picture of a soak that has ended

Two processes train a tiny InternViT with UPerNet under ZeRO-3, with an average of the weights and saves in
the background, as `deepspeed launch/train.py CONFIG --resume auto`, which is typed again whenever it ends.
`soaking/faults.py` lists what is done to it: signals, kills, hangs, a disk that is full or does not answer, a
clock that jumps, bits that flip in what was saved. Its disk is an ext4 file system of its own in a file, its
/dev/shm one of its own too, so that nothing else on the machine is disturbed; both need root.

DIR then holds soak.md (the table), soak.png, events.jsonl, the log of every attempt and the samples of
memory, files and threads. Ends with a line of JSON, and with 0 when no step, record or bit of the last
weights is another than without the faults, every fault ended as documented, and nothing grew.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from soaking.attempt import Attempt
from soaking.clock import Clock
from soaking.comparison import differing_records, differing_weights
from soaking.disk import Disk
from soaking.report import draw, growth, lines_of, table
from soaking.soak import Soak, training_command
from soaking.vitals import Vitals

from internseg_ds.synthetic.generated_ade20k import write_generated_ade20k

log = logging.getLogger("soak")
INSIDE = "INTERNSEG_SOAK_INSIDE"
GROWTH = 1.1
"""What any figure of the undisturbed run may grow by between its second tenth and its last."""
LEAST_STEPS = 1000
"""For that to mean anything: in a shorter run the second tenth is still its start."""


def own_mounts() -> None:
    """Starts this program again where its mounts are its own, with a /dev/shm of its own."""
    if INSIDE not in os.environ:
        if os.geteuid() or not shutil.which("unshare"):
            sys.exit("error: a soak mounts disks of its own: it needs root, and unshare of util-linux")
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "soak", "/dev/shm"], check=True)


def train_undisturbed(out: Path, data: Path, settings: dict[str, int]) -> None:
    work_dir = out / "undisturbed"
    attempt = Attempt(training_command(work_dir, data, **settings), work_dir, out / "undisturbed.log", {})
    vitals = Vitals(out / "vitals_undisturbed.jsonl", lambda: attempt)
    said = 0.0
    while not attempt.wait(attempt.ended, 30):
        if (step := attempt.step()) and time.monotonic() - said > 120:
            said = time.monotonic()
            log.info("undisturbed: step %d of %d", step, settings["steps"])
    vitals.close()
    if attempt.launcher.returncode:
        sys.exit(f"error: the undisturbed run ended with {attempt.launcher.returncode}; see {attempt.log}")


def train_disturbed(out: Path, data: Path, settings: dict[str, int], *, every_s: float, seed: int) -> None:
    """Leaves the run's work directory in OUT/disturbed."""
    disk = Disk(out / "disk.img", out / "disk", mib=192, files=2000)
    soak = Soak(
        training_command(disk.folder / "run", data, **settings),
        disk.folder / "run",
        out,
        disk,
        Clock(out / "clock"),
        save_every=settings["save_every"],
        every_s=every_s,
        seed=seed,
    )
    vitals = Vitals(out / "vitals_disturbed.jsonl", lambda: getattr(soak, "attempt", None))
    try:
        soak.run()
    finally:
        disk.thaw()
        vitals.close()
        if hasattr(soak, "attempt"):
            soak.attempt.kill()
            soak.attempt.wait(soak.attempt.ended, 30)
        shutil.copytree(disk.folder / "run", out / "disturbed", ignore=shutil.ignore_patterns("*.removed*"))
        disk.close()


def report(out: Path, settings: dict[str, int]) -> int:
    """Writes what was seen; returns how many things should not have been."""
    events = lines_of(out / "events.jsonl")
    calm, disturbed = lines_of(out / "vitals_undisturbed.jsonl"), lines_of(out / "vitals_disturbed.jsonl")
    wrong = [
        f"step {event['step']}, {event['fault']}: {text}" for event in events for text in event["problem"]
    ]
    wrong += [
        f"step {event['step']}, {event['fault']}: {event['left_mib']} MiB left in /dev/shm"
        for event in events
        if event["left_mib"] > 0.1
    ]
    wrong += differing_records(out / "undisturbed", out / "disturbed")
    weights = differing_weights(out / "undisturbed", out / "disturbed", out)
    wrong += [f"not equal to the undisturbed run's: {name}" for name in weights]
    grown = growth(calm, settings["steps"])
    wrong += [
        f"{what} of the undisturbed run: {early:g} -> {late:g}"
        for what, (early, late) in grown.items()
        if settings["steps"] >= LEAST_STEPS and late > GROWTH * early + 1
    ]
    draw(calm, disturbed, events, out / "soak.png")
    text = table(events) + "\n\n" + ("\n".join(wrong) or "Nothing was lost, and nothing differs.") + "\n"
    (out / "soak.md").write_text(text)
    print(text)
    print(
        json.dumps(
            {
                "steps": settings["steps"],
                "faults": len(events),
                "kinds": len({event["fault"] for event in events}),
                "attempts": len(list(out.glob("attempt_*.log"))),
                "steps_made_again": sum(event["lost"] for event in events),
                "tracebacks": sum(event["traceback"] for event in events),
                "weights_that_differ": len(weights),
                "wrong": len(wrong),
                "grown": grown,
            }
        )
    )
    return len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument(
        "--every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="between two faults, on average (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--report", action="store_true", help="looks again at a soak that has ended")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    settings = {"steps": args.steps, "save_every": args.save_every, "evaluate_every": args.evaluate_every}
    out = args.out.resolve()
    if not args.report:
        own_mounts()
        if out.joinpath("events.jsonl").exists() or out.joinpath("disk.img").exists():
            sys.exit(f"error: {out} holds a soak; name another folder")
        out.mkdir(parents=True, exist_ok=True)
        data = out / "ade"
        if not data.exists():
            write_generated_ade20k(data, training=23, validation=7)
        if not out.joinpath("undisturbed/checkpoints/latest").exists():
            train_undisturbed(out, data, settings)
        train_disturbed(out, data, settings, every_s=args.every, seed=args.seed)
    sys.exit(1 if report(out, settings) else 0)


if __name__ == "__main__":
    main()
