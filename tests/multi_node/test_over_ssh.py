"""Training and evaluation over several hosts, started by `deepspeed --hostfile` with pdsh and ssh: a shared
work directory, one on each host, and sudden ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from internseg_ds.checkpoints.manifest import read_manifest
from tests.conftest import ROOT, TINY, data_options
from tests.end_to_end.conftest import SMALL, Run
from tests.multi_node.conftest import Cluster
from tests.multi_node.hosts import hosts


def shard(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*_optim_states.pt"))


@pytest.fixture(scope="module")
def shared(two: Cluster) -> Run:
    """4 steps over two hosts under ZeRO-3, saved at 2 and 4 in a folder that both see."""
    return two.train(two.folder / "shared")


def test_two_hosts_train_with_a_shared_folder(shared):
    assert "2 processes on cpu, ZeRO-3" in shared.output and list(shared.losses) == [1, 2, 3, 4]
    save = shared.work_dir / "checkpoints" / "iter_4"
    assert len(shard(save)) == 2 and not read_manifest(save)["node_local"]


def test_two_hosts_evaluate(shared, two):
    out = two.folder / "evaluation"
    two.run(
        "launch/test.py",
        TINY,
        shared.work_dir,
        "--eval",
        "mIoU",
        "--out",
        out,
        "--cfg-options",
        *SMALL,
        *data_options(two.data),
    )
    results = json.loads((out / "results.json").read_text())
    assert results["images"] == 7 and 0 <= results["mIoU"] <= 100


@pytest.mark.parametrize(
    ("launcher", "tolerance"), [("", 0), ("--include node1", 1e-2)], ids=["both hosts", "one host"]
)
def test_it_goes_on_from_a_shared_folder_on(launcher, tolerance, shared, two):
    run = two.train(
        two.folder / f"resumed{len(launcher)}",
        "--resume",
        shared.work_dir / "checkpoints" / "iter_2",
        launcher=launcher,
    )
    assert run.losses == pytest.approx({step: shared.losses[step] for step in (3, 4)}, rel=tolerance, abs=0)


def test_a_folder_that_hosts_do_not_share_ends_the_run_before_it_trains(two):
    run = two.train(two.local / "unasked", code=2)
    assert (
        "error: the work directory" in run.output
        and "use_node_local_storage" in run.output
        and "Traceback" not in run.output
    )
    for host in two.hosts:
        assert list((host.mine / "unasked").iterdir()) == []


def node_local(folder: Path, name: str = "zero3_bf16") -> Path:
    """A ds_config of ours, with the key."""
    path = folder / f"{name}_node_local.json"
    path.write_text(
        json.dumps(
            json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
            | {"checkpoint": {"use_node_local_storage": True}}
        )
    )
    return path


def test_each_host_keeps_its_own_files_and_goes_on_from_what_all_have(shared, two):
    ds_config = node_local(two.folder)
    run = two.train(two.local / "kept", "--deepspeed_config", ds_config)
    folders = [host.mine / "kept" / "checkpoints" for host in two.hosts]
    for rank, folder in enumerate(folders):
        assert (
            (folder / "latest").read_text() == "iter_4"
            and len(shard(folder / "iter_4")) == 1
            and f"rank_{rank}_" in shard(folder / "iter_4")[0]
        )
        assert read_manifest(folder / "iter_4")["node_local"]
    records = two.hosts[0].mine / "kept"
    assert Run(records, "", 0).losses == shared.losses
    # as when node2 dies between the publishing of node1 and its own
    (folders[1] / "iter_4").rename(folders[1] / "iter_4.partial")
    (folders[1] / "latest").write_text("iter_2")
    run = two.train(two.local / "kept", "--deepspeed_config", ds_config, "--resume", "auto")
    assert "(node1 iter_4, node2 iter_2); going on from iter_2" in run.output
    assert "step 2, " in run.output and Run(records, "", 0).losses == shared.losses
    assert all(
        (folder / "latest").read_text() == "iter_4" and not list(folder.glob("*.partial"))
        for folder in folders
    )

    def consolidate(folder: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "launch/consolidate.py", folder, two.folder / "whole.pth"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    refused = consolidate(folders[1])
    assert refused.returncode == 2 and "folders of all hosts" in refused.stderr, refused.stderr
    shutil.copytree(folders[1] / "iter_4", two.folder / "together" / "iter_4")
    shutil.copytree(folders[0] / "iter_4", two.folder / "together" / "iter_4", dirs_exist_ok=True)
    assert consolidate(two.folder / "together" / "iter_4").returncode == 0


def test_three_hosts_train_with_a_folder_on_each(cluster_of):
    with cluster_of(3) as three:
        run = three.train(
            three.local / "kept",
            "--deepspeed_config",
            node_local(three.folder, "zero2_bf16"),
            options=("runner.max_iters=2", "engine.global_batch=6"),
        )
        assert "3 processes on cpu, ZeRO-2" in run.output
        for rank, host in enumerate(three.hosts):
            assert [
                f"rank_{rank}_" in name for name in shard(host.mine / "kept" / "checkpoints" / "iter_2")
            ] == [True]


def started(two: Cluster, name: str) -> tuple[subprocess.Popen, Path]:
    """A run that would go on for long, and that has begun to train."""
    work_dir = two.folder / name
    running = two.start(
        "launch/train.py",
        TINY,
        "--work-dir",
        work_dir,
        "--no-validate",
        "--cfg-options",
        *SMALL,
        "runner.max_iters=10000",
        *data_options(two.data),
        output=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (work_dir / "metrics.jsonl").exists() or not (work_dir / "metrics.jsonl").read_text():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return running, work_dir


def test_when_a_process_is_killed_on_one_host_nothing_runs_on_on_another(two):
    running, _ = started(two, "killed")
    (rank,) = [
        pid
        for pid, line in two.hosts[1].python_processes().items()
        if "launch/train.py" in line and "deepspeed.launcher" not in line
    ][:1]
    os.kill(rank, signal.SIGKILL)
    # the largest of the hosts' codes: that of the host whose rank was killed
    assert running.wait(timeout=60) == 256 - signal.SIGKILL
    two.check_nothing_is_left()


def test_ctrl_c_ends_the_run_on_every_host_with_a_save(two):
    running, work_dir = started(two, "interrupted")
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    assert running.wait(timeout=60) != 0
    two.check_nothing_is_left(30)
    assert (work_dir / "checkpoints" / "latest").is_file() and "stopped at step" in (
        work_dir / "train.log"
    ).read_text()


def test_nothing_of_the_hosts_stays_on_this_machine(tmp_path):
    def state() -> tuple[str, str, set[str]]:
        return (
            Path("/proc/self/mounts").read_text(),
            subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout,
            set(os.listdir("/etc")),
        )

    before = state()
    with pytest.raises(ZeroDivisionError), hosts(2, tmp_path / "hosts") as found:
        first, second = (host.init for host in found)
        assert found[0].run("ssh", "node2", "hostname").strip() == "node2"
        raise ZeroDivisionError
    assert state() == before and not Path(f"/proc/{first}").exists() and not Path(f"/proc/{second}").exists()


def test_hosts_go_with_the_process_that_has_them_even_when_it_is_killed(tmp_path):
    script = (
        "import sys, time, pathlib; from tests.multi_node.hosts import hosts\n"
        "with hosts(1, pathlib.Path(sys.argv[1])) as found: print(found[0].init, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "hosts"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    init = psutil.Process(int(process.stdout.readline()))
    assert "sshd" in init.name()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    with suppress(psutil.NoSuchProcess):
        while init.status() != psutil.STATUS_ZOMBIE:  # in a container whose process 1 reaps nobody
            assert time.monotonic() < deadline
            time.sleep(0.1)
