"""What is done to a training: each fault is injected into the running attempt, or into the next one's start,
and taken back afterwards.

A fault is a generator: up to its `yield` it does the harm, behind it it mends what the run itself cannot
(makes room, thaws the disk). `ends` says by which exit codes the attempt may end, of the launcher, which has
a signal n as -n or 256 - n; empty where the training is to go on. `loses` bounds the steps that may have to
be made again, in saves' distances.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import psutil

from internseg_ds.exit_codes import INTERRUPTED, LOST, STOPPED, USER_ERROR

if TYPE_CHECKING:
    from soaking.soak import Soak

KILLED = {-signal.SIGKILL, 256 - signal.SIGKILL, 128 + signal.SIGKILL}
TERMINATED = {-signal.SIGTERM, 256 - signal.SIGTERM, 128 + signal.SIGTERM}
DIED = KILLED | {LOST}
STOPPED_BY_HAND = {STOPPED, INTERRUPTED, 1}
"""deepspeed's launcher ends with 1 or 130 by a Ctrl-C, whatever its ranks say."""
IO_TIMEOUT_S = 45.0
"""engine.io_timeout of the run."""

Act = Callable[["Soak"], Iterator[None]]


@dataclass(frozen=True)
class Fault:
    name: str
    act: Act
    ends: Collection[int]
    loses: float
    at_start: bool
    """Whether it is done to the start of an attempt."""


FAULTS: list[Fault] = []


def fault(
    name: str, *, ends: Collection[int] = (), loses: float = 0, at_start: bool = False
) -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        FAULTS.append(Fault(name, act, ends, loses, at_start))
        return act

    return add


# processes


@fault("a rank is killed", ends=DIED, loses=2)
def rank_killed(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.ranks()).kill()
    yield


@fault("all processes are killed", ends=DIED, loses=2)
def all_killed(soak: "Soak") -> Iterator[None]:
    soak.attempt.kill()
    yield


@fault("all are killed in the middle of a save", ends=DIED, loses=2)
def killed_while_saving(soak: "Soak") -> Iterator[None]:
    soak.attempt.wait(lambda: any(soak.checkpoints.glob("*.partial")), 60)
    soak.attempt.kill()
    yield


@fault("a data worker is killed", ends=DIED, loses=2)
def worker_killed(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.workers()).kill()
    yield


@fault("a rank stands still for good", ends=DIED, loses=2)
def rank_frozen(soak: "Soak") -> Iterator[None]:
    rank = soak.any_of(soak.attempt.ranks())
    rank.suspend()
    soak.attempt.wait(lambda: b"has given no sign of life" in soak.attempt.said() or soak.attempt.ended(), 90)
    yield
    with suppress(psutil.Error):
        rank.resume()


@fault("a rank stands still for 5 s")
def rank_pauses(soak: "Soak") -> Iterator[None]:
    rank = soak.any_of(soak.attempt.ranks())
    rank.suspend()
    time.sleep(5)
    rank.resume()
    yield


@fault("a data worker hangs", ends=DIED, loses=2)
def worker_frozen(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.workers()).suspend()
    yield


@fault("deepspeed's launcher is killed", ends=KILLED)
def launcher_killed(soak: "Soak") -> Iterator[None]:
    soak.attempt.launcher.kill()
    node = soak.attempt.node_launcher()
    if node is not None:
        node.kill()
    yield


@fault("deepspeed's launcher gets SIGTERM", ends=TERMINATED | {STOPPED})
def launcher_terminated(soak: "Soak") -> Iterator[None]:
    soak.attempt.launcher.terminate()
    yield


@fault("SIGTERM to a rank", ends={STOPPED})
def terminated(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.ranks()).terminate()
    yield


@fault("SIGUSR1 to a rank", ends={STOPPED})
def warned(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.ranks()).send_signal(signal.SIGUSR1)
    yield


@fault("Ctrl-C", ends=STOPPED_BY_HAND)
def ctrl_c(soak: "Soak") -> Iterator[None]:
    os.killpg(soak.attempt.session, signal.SIGINT)
    yield


@fault("WORK_DIR/STOP", ends={STOPPED})
def stop_file(soak: "Soak") -> Iterator[None]:
    soak.work_dir.joinpath("STOP").touch()
    yield
    soak.work_dir.joinpath("STOP").unlink()


# starts


@fault("SIGTERM while it builds", ends=TERMINATED | {STOPPED}, at_start=True)
def terminated_while_building(soak: "Soak") -> Iterator[None]:
    soak.start()
    soak.attempt.wait(lambda: len(soak.attempt.ranks()) == 2, 60)
    time.sleep(soak.random.uniform(0, 8))
    for rank in soak.attempt.ranks():
        with suppress(psutil.Error):
            rank.terminate()
    yield


@fault("all are killed while it builds", ends=DIED, at_start=True)
def killed_while_building(soak: "Soak") -> Iterator[None]:
    soak.start()
    soak.attempt.wait(lambda: len(soak.attempt.ranks()) == 2, 60)
    time.sleep(soak.random.uniform(0, 8))
    soak.attempt.kill()
    yield


@fault("too few open files", ends={USER_ERROR}, at_start=True)
def few_open_files(soak: "Soak") -> Iterator[None]:
    soak.start(open_files=48)
    yield


@fault("/dev/shm is full", ends={USER_ERROR}, at_start=True)
def full_shm(soak: "Soak") -> Iterator[None]:
    filler = Path("/dev/shm/filler")
    free = os.statvfs("/dev/shm")
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize)
    soak.start()
    yield
    filler.unlink()


# disk


@fault("the disk is full by bytes, for 25 s")
def full_by_bytes(soak: "Soak") -> Iterator[None]:
    soak.disk.fill()
    time.sleep(25)
    yield
    soak.disk.make_room()


@fault("the disk is full by inodes, for 25 s")
def full_by_inodes(soak: "Soak") -> Iterator[None]:
    soak.disk.use_up_inodes()
    time.sleep(25)
    yield
    soak.disk.make_room()


@fault("the disk does not answer for 10 s")
def short_hang_of_disk(soak: "Soak") -> Iterator[None]:
    soak.disk.freeze()
    time.sleep(10)
    yield
    soak.disk.thaw()


@fault("the disk does not answer for longer than engine.io_timeout", ends=DIED, loses=3)
def hang_of_disk(soak: "Soak") -> Iterator[None]:
    soak.disk.freeze()
    soak.attempt.wait(soak.attempt.ended, IO_TIMEOUT_S + 60)
    soak.disk.thaw()
    yield


# what lies on the disk


@fault("a bit of the newest save flips, all are killed", ends=DIED, loses=3)
def flipped(soak: "Soak") -> Iterator[None]:
    file = soak.any_of(sorted(path for path in soak.newest().iterdir() if path.stat().st_size))
    at = soak.random.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << soak.random.randrange(8)]))
    soak.attempt.kill()
    yield


@fault("two ranks' files of the newest save are swapped, all are killed", ends=DIED, loses=3)
def swapped(soak: "Soak") -> Iterator[None]:
    one, other = sorted(soak.newest().glob("*optim_states.pt"))
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)
    soak.attempt.kill()
    yield


@fault("a file of the newest save is gone, all are killed", ends=DIED, loses=3)
def file_gone(soak: "Soak") -> Iterator[None]:
    soak.any_of(sorted(soak.newest().iterdir())).unlink()
    soak.attempt.kill()
    yield


@fault("a file of the newest save is cut short, all are killed", ends=DIED, loses=3)
def file_cut(soak: "Soak") -> Iterator[None]:
    file = soak.any_of(sorted(path for path in soak.newest().iterdir() if path.stat().st_size))
    os.truncate(file, soak.random.randrange(file.stat().st_size))
    soak.attempt.kill()
    yield


@fault("`latest` holds binary, all are killed", ends=DIED, loses=2)
def latest_binary(soak: "Soak") -> Iterator[None]:
    soak.checkpoints.joinpath("latest").write_bytes(soak.random.randbytes(64))
    soak.attempt.kill()
    yield


@fault("a file has the name of the next save")
def name_taken(soak: "Soak") -> Iterator[None]:
    step = soak.attempt.step() or 0
    taken = soak.checkpoints / f"iter_{(step // soak.save_every + 1) * soak.save_every}"
    taken.write_text("not a checkpoint\n")
    soak.wait_for_saves(2)
    yield
    if taken.is_file():
        taken.unlink()


@fault("the note of an older save is damaged")
def note_damaged(soak: "Soak") -> Iterator[None]:
    newest = soak.newest()
    for older in soak.checkpoints.glob("iter_*/internseg_ds.json"):
        if older.parent != newest:
            older.write_text(soak.any_of(["[]", "null", "{", "[" * 100000, '{"step": {}}']))
            break
    soak.wait_for_saves(2)
    yield


@fault("an older save is busy (a mount point)")
def busy_save(soak: "Soak") -> Iterator[None]:
    newest = soak.newest()
    older = next(
        (path for path in sorted(soak.checkpoints.glob("iter_*")) if path.is_dir() and path != newest), newest
    )
    subprocess.run(["mount", "--bind", str(older), str(older)], check=True)
    soak.wait_for_saves(3)
    yield
    for path in soak.checkpoints.iterdir():  # retention may have renamed what it could
        if path.is_mount():
            subprocess.run(["umount", "--lazy", str(path)], check=True)


# clock


@fault("the clock goes back two hours")
def clock_back(soak: "Soak") -> Iterator[None]:
    soak.clock.move(-7200)
    soak.wait_for_saves(2)
    yield


@fault("the clock goes on three days")
def clock_forward(soak: "Soak") -> Iterator[None]:
    soak.clock.move(3 * 86400)
    soak.wait_for_saves(2)
    yield


@fault("a resume on a host that is an hour behind", ends={STOPPED})
def resumed_behind(soak: "Soak") -> Iterator[None]:
    soak.any_of(soak.attempt.ranks()).terminate()
    yield
    soak.clock.move(-3600)


def deck(random: Random) -> Iterator[Fault]:
    """Every fault once, in a random order, and again."""
    while True:
        yield from random.sample(FAULTS, len(FAULTS))
