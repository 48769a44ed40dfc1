"""Runs over ssh as a user starts them: `deepspeed --hostfile ...` on the first of several hosts."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY, data_options
from tests.end_to_end.conftest import NO_NOISE, SMALL, Run
from tests.multi_node.hosts import INTERFACE, Host, environment, hosts, missing

OPTIONS = [*SMALL, *NO_NOISE, "runner.max_iters=4", "checkpoint_config.interval=2"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.multinode)


@dataclass(frozen=True)
class Cluster:
    """Hosts with a folder `local` of the same path that is another one on each, and a user who may start runs
    on the first."""

    hosts: list[Host]
    local: Path
    folder: Path
    data: Path

    def start(
        self, script: str, *arguments: object, launcher: str = "", output: int = subprocess.PIPE
    ) -> subprocess.Popen:
        """launcher: further options of the deepspeed command."""
        hostfile = self.folder / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots=1\n" for host in self.hosts))
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin"
        settings = {"PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
        settings |= {
            name: os.environ[name]
            for name in ("TORCH_EXTENSIONS_DIR", "INTERNSEG_DEVICE", "DS_ACCELERATOR")
            if name in os.environ
        }
        env = environment(self.folder / "home", settings) | {"PATH": path}
        return self.hosts[0].start(
            "deepspeed",
            "--hostfile",
            hostfile,
            *launcher.split(),
            script,
            *arguments,
            env=env,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: object, code: int = 0, **settings) -> str:
        """The output of a run that ends with `code`, and leaves nothing on any host."""
        started = self.start(*arguments, **settings)
        try:
            output, _ = started.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, 9)
            raise AssertionError(
                f"{arguments} has not ended; it has said: {started.stdout.read()[-5000:]}"
            ) from None
        assert started.returncode == code, f"{arguments} ended with {started.returncode}: {output[-5000:]}"
        self.check_nothing_is_left()
        return output

    def train(self, work_dir: Path, *arguments: object, options: tuple[str, ...] = (), **settings) -> Run:
        output = self.run(
            "launch/train.py",
            TINY,
            "--work-dir",
            work_dir,
            "--no-validate",
            *arguments,
            "--cfg-options",
            *OPTIONS,
            *data_options(self.data),
            *options,
            **settings,
        )
        return Run(work_dir, output, settings.get("code", 0))

    def check_nothing_is_left(self, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while left := {
            host.name: found for host in self.hosts if (found := list(host.python_processes().values()))
        }:
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        for host in self.hosts:
            assert host.run("ls", "/dev/shm") == ""


@pytest.fixture(scope="session")
def cluster_of(ade20k: Path, tmp_path_factory: pytest.TempPathFactory):
    """cluster_of(count): a context manager that has a Cluster of so many hosts. What is missing on the
    machine ends the session, with one sentence."""
    from contextlib import contextmanager

    if problem := missing():
        pytest.exit(f"test-multinode cannot run: {problem}", returncode=1)

    @contextmanager
    def made(count: int) -> Iterator[Cluster]:
        folder = tmp_path_factory.mktemp("cluster")
        with hosts(count, folder / "hosts") as found:
            yield Cluster(found, folder / "hosts" / "local", folder, ade20k)

    return made


@pytest.fixture(scope="module")
def two(cluster_of) -> Iterator[Cluster]:
    with cluster_of(2) as cluster:
        yield cluster
