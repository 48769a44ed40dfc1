"""A Slurm of one node on this machine, with its own munge: daemons in the foreground, everything they write
in one folder. Works as root and as a user."""

import getpass
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import free_port
from tests.schedulers.runs import ENVIRONMENT, need, wait_for

# cred_expire: how long a requeued job waits before it may start again (120 s by default);
# the node is called localhost because ranks meet at the first node's name
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2
PartitionName=tests Nodes=localhost Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Cluster:
    environment: dict[str, str]

    def run(self, *command: object, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env={**self.environment, **env},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert not (check and done.returncode), (
            f"{command} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""
        shown = self.run("scontrol", "show", "job", job, cwd=Path("/")).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)["JobState"]


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """folder: short, for a socket's path may have 107 characters."""
    need(slurmctld="slurmctld", slurmd="slurmd", srun="slurm-client", munged="munge")
    (folder / "state").mkdir()
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONFIG.format(
            folder=folder,
            user=getpass.getuser(),
            host=socket.gethostname().partition(".")[0],
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{ENVIRONMENT['PATH']}:/usr/sbin:/sbin",
        "SLURM_CONF": str(conf),
    }
    made = Cluster(environment)
    with ExitStack() as daemons:
        for name, *options in (
            (
                "munged",
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={folder}/munge",
                f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/seed",
            ),
            ("slurmctld", "-D", "-i", "-f", conf),
            ("slurmd", "-D", "-f", conf),
        ):
            log = daemons.enter_context((folder / f"{name}.out").open("w"))
            process = subprocess.Popen(
                [name, *map(str, options)], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            daemons.callback(_end, process)
            time.sleep(1)
        wait_for(
            lambda: "idle" in made.run("sinfo", "-h", "-o", "%T", cwd=folder, check=False).stdout,
            "idle node",
            timeout_s=30,
            output=lambda: "\n".join(file.read_text() for file in folder.glob("*.out")),
        )
        yield made
        made.run("scancel", "--user", getpass.getuser(), cwd=folder, check=False)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
