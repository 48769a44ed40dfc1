"""Who is blamed for a hang: where waiting looks as it does under nccl, in a call that has no frame of a
collective."""

import gc
import inspect
import linecache
import threading
import time
import weakref
from dataclasses import replace

import torch
import torch.distributed as dist

from internseg_ds.distributed.hang_verdict import WAITING_CALL, RankStatus, line_of, verdict
from internseg_ds.distributed.process_group import world_from_environment
from internseg_ds.distributed.watchdog import Watchdog
from internseg_ds.exit_codes import LOST
from tests.distributed.test_watchdog import ranks

HERE = [
    RankStatus(
        rank,
        f"host{rank}",
        100 + rank,
        step=7,
        doing="update",
        line="file.py:1 f",
        waits=True,
        stands_s=30 - rank,
    )
    for rank in range(4)
]


def test_who_waits_in_no_call_is_at_fault_wherever_it_stands():
    for doing in ("data", "forward", "update", "agreeing"):
        everybody = [*HERE[:2], replace(HERE[2], doing=doing, waits=False), HERE[3]]
        word, about = verdict(everybody, 20)
        assert about is everybody[2] and "the other 3 wait for rank 2 (host host2" in word


def test_who_stands_behind_but_waits_is_not_blamed_for_one_ahead_that_does_not():
    everybody = [replace(HERE[0], doing="forward"), replace(HERE[1], waits=False), *HERE[2:]]
    assert verdict(everybody, 20)[1].rank == 1


def test_of_several_that_wait_in_no_call_those_furthest_behind_are_named():
    everybody = [
        replace(HERE[0], waits=False),
        replace(HERE[1], waits=False, doing="data"),
        replace(HERE[2], waits=False, doing="data"),
        HERE[3],
    ]
    word, about = verdict(everybody, 20)
    assert about.rank == 1 and "rank 1 (" in word and "rank 2 (" in word and "rank 0 (" not in word


def test_where_all_wait_nobody_is_blamed_and_the_last_to_come_stands_first():
    word, about = verdict(HERE, 20)
    assert about.rank == 3 and "all wait" in word
    assert (
        word.index("rank 3 (") < word.index("rank 2 (") < word.index("rank 0 (") and "there for 27 s" in word
    )


class FromDevice:
    """A value that a GPU has not computed yet: reading it waits in a call without a frame of
    torch.distributed, until a collective is over."""

    def __init__(self, work: dist.Work) -> None:
        self.ready = threading.Lock()
        self.ready.acquire()
        threading.Thread(target=self._until_done, args=(work,), daemon=True).start()

    def _until_done(self, work: dist.Work) -> None:
        work.wait()
        self.ready.release()

    @property
    def item(self):
        return self.ready.acquire


def reads_a_value_that_rank_1_keeps_back(rank: int) -> None:
    watch = Watchdog(world_from_environment(), hang_s=3)
    for step in range(1, 20):
        watch.at(step, "update")  # all of them at the same part
        if rank == 1 and step == 5:
            while True:
                time.sleep(0.01)
        overflow = FromDevice(dist.all_reduce(torch.ones(1), async_op=True))
        overflow.item()
    watch.close()


def test_a_look_at_the_threads_keeps_nothing_of_their_frames_alive():
    class Activation:
        pass

    def step() -> weakref.ref:
        activation = Activation()
        assert line_of(threading.get_ident())[0].endswith("line_of")
        return weakref.ref(activation)

    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()


def test_a_rank_that_hangs_at_the_part_where_the_others_read_from_their_gpus_is_named(tmp_path):
    codes, log = ranks(reads_a_value_that_rank_1_keeps_back, 3, tmp_path)
    assert codes == [LOST] * 3
    assert (
        "the other 2 wait for rank 1 (host " in log
        and "at step 5, update (" in log
        and "reads_a_value_that_rank_1_keeps_back" in log
    )


def gathers_weights_that_rank_1_keeps_back(rank: int) -> None:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init

    watch = Watchdog(world_from_environment(), hang_s=3)
    with Init(config_dict_or_path={"train_batch_size": 3, "zero_optimization": {"stage": 3}}):
        layer = torch.nn.Linear(4, 4)
    watch.at(1, "forward")
    while rank == 1:
        time.sleep(0.01)
    with GatheredParameters(list(layer.parameters())):
        pass
    watch.close()


def test_a_rank_that_hangs_before_the_first_weights_of_zero3_are_gathered_is_named(tmp_path):
    """The others wait in a handle of DeepSpeed's, through a wrapper that has no frame of a collective."""
    codes, log = ranks(gathers_weights_that_rank_1_keeps_back, 3, tmp_path)
    assert codes == [LOST] * 3
    assert "the other 2 wait for rank 1 (host " in log and "gathers_weights_that_rank_1_keeps_back" in log, (
        log
    )


def test_a_thread_at_work_is_in_no_waiting_call():
    ends = threading.Event()

    def busy() -> None:
        while not ends.is_set():
            sum(range(1000))

    thread = threading.Thread(target=busy)
    thread.start()
    time.sleep(0.1)
    found = [line_of(thread.ident) for _ in range(20)]
    ends.set()
    thread.join()
    assert not any(waits for _, waits in found) and any("busy" in line for line, _ in found)


def standing_in(path: str, name: str, source: str, **names: object) -> threading.Thread:
    """A thread in a function of this name, as if its file lay there."""
    text = f"def {name}():\n    {source}\n"
    linecache.cache[path] = len(text), None, text.splitlines(keepends=True), path
    exec(compile(text, path, "exec"), names)
    thread = threading.Thread(target=names[name], daemon=True)
    thread.start()
    time.sleep(0.1)
    return thread


def test_in_a_backward_pass_on_a_gpu_the_thread_with_its_hooks_is_looked_at():
    """Autograd has a thread for each GPU, and the main thread stands in its engine."""
    ends = threading.Lock()
    ends.acquire()
    main = standing_in(
        "/site-packages/torch/autograd/graph.py", "_engine_run_backward", "run()", run=ends.acquire
    )
    place, waits = line_of(main.ident)
    assert waits and "_engine_run_backward" in place  # no hook runs: torch's own code
    event = type("Event", (), {"synchronize": lambda self: None})()
    event.synchronize = ends.acquire  # a C function, as CUDA's is
    reading = standing_in(
        "/site-packages/deepspeed/runtime/zero/stage3.py", "reduce", "event.synchronize()", event=event
    )
    place, waits = line_of(main.ident)
    assert waits and place == "runtime/zero/stage3.py:2 reduce"
    for _ in range(2):
        ends.release()
        time.sleep(0.1)
    reading.join(1), main.join(1)


def test_a_hook_that_hangs_in_a_backward_pass_is_no_waiting():
    ends = threading.Lock()
    ends.acquire()
    main = standing_in(
        "/site-packages/torch/autograd/graph.py", "_engine_run_backward", "run()", run=ends.acquire
    )
    hook = standing_in(
        "/site-packages/deepspeed/runtime/zero/hook.py", "hook", "lock(True, 60)", lock=ends.acquire
    )
    place, waits = line_of(main.ident)
    assert not waits and place.endswith("hook.py:2 hook")
    for _ in range(2):
        ends.release()
        time.sleep(0.1)
    hook.join(1), main.join(1)


def test_the_line_at_which_torch_waits_for_a_whole_gpu_is_a_waiting_call():
    assert any(
        WAITING_CALL.search(line)
        for line in inspect.getsource(torch.cuda.synchronize).splitlines()
        if "return" in line
    )
