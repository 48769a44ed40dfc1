"""Several hosts on one machine: each has a network, host name, processes, /dev/shm, /etc/ssh and /etc/hosts
of its own, an sshd, and no GPU.

A host is one process tree in Linux namespaces of its own. Networks and mounts live in those namespaces and go
with them, and the tree goes with the process that started it, so that nothing stays on the machine, even when
the tests are killed. The hosts share the file system, except for one folder, `local`, which has the same path
on each and is another folder on each.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
INTERFACE = "fabric0"

SSHD_CONFIG = """
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
"""
SSH_CONFIG = """
IdentityFile {keys}/user
GlobalKnownHostsFile {keys}/known_hosts
UserKnownHostsFile /dev/null
StrictHostKeyChecking yes
"""
# run as process 1 of a host; sshd wants its path to be absolute
START = """
set -e
hostname {name}
mount --bind {etc_ssh} /etc/ssh
mount --bind {etc_hosts} /etc/hosts
mount --bind {mine} {local}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
for device in /dev/nvidia*; do [ ! -c $device ] || mount --bind /dev/null $device; done
exec {sshd} -D -e -f /etc/ssh/sshd_config
"""


@dataclass(frozen=True)
class Host:
    """name and address: as the other hosts know it. process: the tree that it is. mine: what lies in its
    folder `local`, seen from outside."""

    name: str
    address: str
    process: psutil.Process
    mine: Path

    @property
    def init(self) -> int:
        """Its process 1, in the numbers of this machine."""
        return self.process.children()[0].pid

    def start(self, *command: object, **settings) -> subprocess.Popen:
        """Starts a command on this host, in a session of its own; settings: of Popen."""
        return subprocess.Popen(
            ["nsenter", "--all", f"--wdns={os.getcwd()}", f"--target={self.init}", "--", *map(str, command)],
            start_new_session=True,
            text=True,
            **settings,
        )

    def run(self, *command: object, timeout: float = 60, **settings) -> str:
        """The output of a command on this host; raises when it fails."""
        started = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings)
        output, _ = started.communicate(timeout=timeout)
        assert started.returncode == 0, f"{command} on {self.name} ended with {started.returncode}: {output}"
        return output

    def python_processes(self) -> dict[int, str]:
        """What runs on this host, python's alone (launcher, ranks, their data workers): pid, in the numbers
        of this machine -> command line.

        By their namespace, and not by their parents: whose parent ends while it is looked for (an ssh
        session) would not be found.
        """
        host, found = os.stat(f"/proc/{self.init}/ns/pid").st_ino, {}
        for process in psutil.process_iter():
            try:
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == host and "python" in (
                    line := " ".join(process.cmdline())
                ):
                    found[process.pid] = line
            except (psutil.Error, OSError):  # it has ended
                continue
        return found


def missing() -> str | None:
    """What the machine lacks for this, and how to have it, in a sentence; None when all is there."""
    if os.geteuid() != 0:
        return (
            "several hosts on one machine need root (network and mount namespaces); run as root, or with sudo"
        )
    packages = sorted({package for tool, package in TOOLS.items() if _tool(tool) is None})
    if packages:
        return (
            f"several hosts on one machine need {', '.join(packages)}; apt-get install {' '.join(packages)}"
        )
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return (
        f"this machine allows no namespaces ({tried.stderr.strip()}); in a container, start it with "
        "--privileged"
        if tried.returncode
        else None
    )


@contextmanager
def hosts(count: int, folder: Path) -> Iterator[list[Host]]:
    """`count` hosts, node1 and so on, that reach each other by ssh without a password. folder: for keys and
    the like; `folder/local` differs on each."""
    keys, local = folder / "keys", folder / "local"
    for made in (keys, local, folder / "ssh"):
        made.mkdir(parents=True)
    names = [f"node{number}" for number in range(1, count + 1)]
    addresses = [f"10.77.0.{number}" for number in range(1, count + 1)]
    for key in ("user", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / key], check=True)
    (keys / "known_hosts").write_text(f"{','.join(names + addresses)} {(keys / 'host.pub').read_text()}")
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in zip(names, addresses))
    )
    (folder / "ssh" / "sshd_config").write_text(SSHD_CONFIG.format(keys=keys))
    (folder / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(keys=keys))
    with ExitStack() as stack:
        found = [stack.enter_context(_host(name, address, folder)) for name, address in zip(names, addresses)]
        first = found[0]
        _ip(first, f"link add {INTERFACE} type bridge")  # the first host is the switch too
        for host in found[1:]:
            _ip(first, f"link add to_{host.name} type veth peer name {INTERFACE} netns {host.init}")
            _ip(first, f"link set to_{host.name} up master {INTERFACE}")
        for host in found:
            _ip(host, f"address add {host.address}/24 dev {INTERFACE}")
            _ip(host, "link set lo up")
            _ip(host, f"link set {INTERFACE} up")
        for host in found:
            _wait_for_ssh(first, host)
        yield found


@contextmanager
def _host(name: str, address: str, folder: Path) -> Iterator[Host]:
    mine = folder / name
    mine.mkdir()
    script = START.format(
        name=name,
        etc_ssh=folder / "ssh",
        etc_hosts=folder / "hosts",
        mine=mine,
        local=folder / "local",
        sshd=_tool("sshd"),
    )
    with (folder / f"{name}.sshd.log").open("w") as log:
        started = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--net",
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                script,
            ],
            stdout=log,
            stderr=log,
        )
    try:
        process = psutil.Process(started.pid)
        while not process.children():
            assert started.poll() is None, (folder / f"{name}.sshd.log").read_text()
            time.sleep(0.01)
        yield Host(name, address, process, mine)
    finally:
        for child in psutil.Process(started.pid).children():
            child.kill()  # process 1 of the host, and with it all others of the host
        started.wait(timeout=20)


def _ip(host: Host, arguments: str) -> None:
    """In the host's network alone: process numbers are this machine's."""
    subprocess.run(["nsenter", "--net", f"--target={host.init}", _tool("ip"), *arguments.split()], check=True)


def _wait_for_ssh(first: Host, host: Host, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            assert first.run("ssh", host.name, "hostname").strip() == host.name
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a user whose home folder is `home` and whose ~/.deepspeed_env carries `settings` to
    every host."""
    home.mkdir(exist_ok=True)
    (home / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    return {**os.environ, "HOME": str(home)}
