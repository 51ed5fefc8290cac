"""Several hosts on one machine: network namespaces with addresses of their own, joined by a bridge.

They share the file system, but for what is hidden, and the processors, not the network: a host whose link is down is
gone for all others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import kill
from ray_head import BIN, ROOT, session_members
from servers.redis import RedisServer
from waiting import wait_until

BRIDGE = "afa-br0"
BRIDGE_ADDRESS = "10.77.0.254"
PORT = 6399
STARTED = "Ray runtime started"  # what ``ray start`` prints
# A host that is cut off is declared dead within seconds, not within a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    # Train waits so long for workers on machines that it does not know to be gone.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


class Host:
    """A namespace with one link, ``eth0`` inside, and the processes that were started in it."""

    def __init__(self, number: int) -> None:
        self.name, self.address, self.link = f"afa-h{number}", f"10.77.0.{number}", f"afa-v{number}"
        self.sessions: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self.name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        for words in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"],
                      ["link", "set", "lo", "up"]):  # fmt: skip
            ip("-n", self.name, *words)

    def cut_off(self) -> None:
        """Pull the cable."""
        ip("link", "set", self.link, "down")

    def bring_back(self) -> None:
        """Plug it in."""
        ip("link", "set", self.link, "up")

    def start(
        self, words: Sequence[object], environment: Mapping[str, str], log: Path, *, own_processes: bool = False
    ) -> subprocess.Popen[bytes]:
        """A process on this host; if it is to have a process table of its own, killing it kills all below it."""
        apart = ["unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"] if own_processes else []
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *apart, *map(str, words)],
                env=dict(environment), stdout=stream, stderr=stream, cwd=ROOT, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.sessions.append(process)
        return process

    def kill_all(self) -> None:
        """Power off."""
        for process in self.sessions:
            kill(session_members(process.pid))
            process.wait()
        self.sessions.clear()


class Hosts:
    """A Ray cluster over hosts: the first has the head.

    Attributes:
        processors: of each host.
        head_words, head_environment: what the head alone is told.
        apart: hosts do not see each other's processes. A head that starts would find those of its cluster otherwise.
        hidden: folders that are empty for the second host.
    """

    processors = (1, 1)
    apart = False
    hidden: Sequence[Path] = ()

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        # Sockets lie below Ray's folder, and their paths must be short.
        self.temp = tempfile.mkdtemp(prefix="afa-ray-")
        self.environment = {
            **environment, **IMPATIENT, "GLOO_SOCKET_IFNAME": "eth0", "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": f"10.77.0.1:{PORT}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.head_words: list[str] = []
        self.head_environment: dict[str, str] = {}
        self.hosts = [Host(number) for number in (1, 2)]

    def keep_state_in(self, redis: RedisServer) -> None:
        """Where a head that is started anew finds what the one before knew."""
        self.head_words, self.head_environment = redis.head_words, redis.head_environment

    def restart_head(self) -> None:
        """Start Ray on the first host once more, and wait for it.

        Not by the number of nodes: for a while the dead head counts as one.
        """
        log = self.folder / f"{self.hosts[0].name}.log"
        started = log.read_text().count(STARTED)
        process = self.start_ray(self.hosts[0])
        wait_until(lambda: log.read_text().count(STARTED) > started, process, log.read_text, 120)

    def start_ray(self, host: Host) -> subprocess.Popen[bytes]:
        """The host's part in the cluster."""
        head = ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1", f"--temp-dir={self.temp}",
                *self.head_words]  # fmt: skip
        first = host is self.hosts[0]
        role = head if first else [f"--address=10.77.0.1:{PORT}"]
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        environment |= self.head_environment if first else {}
        processors = self.processors[self.hosts.index(host)]
        return host.start(
            [*([] if first else self._with_own_mounts()), BIN / "ray", "start", *role, "--block",
             f"--node-ip-address={host.address}", f"--num-cpus={processors}", "--object-store-memory=150000000"],
            environment, self.folder / f"{host.name}.log", own_processes=self.apart,
        )  # fmt: skip

    def _with_own_mounts(self) -> list[str]:
        """What hides folders from the second host.

        Ray's is one where nodes are apart: they would write over what they say of themselves, and a driver take another
        node for its own.
        """
        mounts = [f"mount -t tmpfs none {folder}" for folder in self.hidden]
        if self.apart:
            own = Path(f"{self.temp}-second")
            own.mkdir(exist_ok=True)
            mounts.append(f"mount --bind {own} {self.temp}")
        return ["sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]

    def lose_second(self) -> None:
        """Cut the second host off until the first has noticed."""
        self.hosts[1].cut_off()
        self.wait_for_nodes(1)

    def return_second(self) -> None:
        """Bring it back, as a new node."""
        second = self.hosts[1]
        second.kill_all()
        second.bring_back()
        self.start_ray(second)
        self.wait_for_nodes(2)

    def status(self) -> str:
        """What the cluster has and what waits for it, in Ray's words."""
        answer = self._on_head(BIN / "ray", "status")
        return answer.stdout + answer.stderr

    def ask_head(self, code: str) -> subprocess.CompletedProcess[str]:
        """What Python code prints on the head."""
        return self._on_head(BIN / "python", "-c", code, f"10.77.0.1:{PORT}")

    def _on_head(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", "afa-h1", *map(str, command)],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def wait_for_nodes(self, number: int, timeout_s: float = 90) -> None:
        """Until so many are alive."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = self.ask_head(COUNT_NODES)
            if answer.stdout.strip() == str(number):
                return
            time.sleep(1)
        logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
        raise TimeoutError(f"not {number} nodes: {answer.stdout} {answer.stderr[-500:]} {logs}")


COUNT_NODES = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)
print(sum(node.state == 0 for node in nodes.values()))
"""


@contextmanager
def two_hosts(folder: Path, environment: Mapping[str, str]) -> Iterator[Hosts]:
    """Two hosts, without Ray yet.

    Args:
        folder: for logs.
        environment: of every process on them.
    """
    if os.geteuid() != 0:
        pytest.skip("not root: no network namespaces")
    remove_hosts()
    made = ip("link", "add", BRIDGE, "type", "bridge", check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    ip("addr", "add", f"{BRIDGE_ADDRESS}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    hosts = Hosts(folder, environment)
    try:
        yield hosts
    finally:
        for host in hosts.hosts:
            host.kill_all()
        remove_hosts()
        subprocess.run(["rm", "-rf", hosts.temp, f"{hosts.temp}-second"], check=False)


def remove_hosts() -> None:
    """What a run that was killed has left behind, too."""
    for name in ("afa-h1", "afa-h2"):
        ip("netns", "del", name, check=False)
    for link in ("afa-v1", "afa-v2", BRIDGE):
        ip("link", "del", link, check=False)
