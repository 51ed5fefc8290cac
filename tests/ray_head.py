"""A Ray cluster of one node as an operator would start it: token, dashboard on loopback, its own ports and folders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import descendants, kill
from servers.s3 import free_port
from waiting import http_status, wait_until

ANSWERS = (200, 401, 403)  # of a dashboard that is there, or is there and wants the token
# What must be found in no file afterwards.
TOKEN = "planted-token-of-the-cluster-0123456789"
MLFLOW_PASSWORD = "planted-mlflow-password"

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# What a run on a cluster is cut down to: six steps on pictures of 64 pixels.
SHORT_VALUES = [
    "optim.total_steps=6", "optim.warmup_steps=0", "loss.classification_steps=2", "loss.affinity_label_step=4",
    "data.crop_px=64", "train.batch_size=2", "train.eval_every=6", "train.eval_samples=4", "train.log_every=2",
    "train.workers=1", "par.dilations=[1,2]", "par.iterations=2",
]  # fmt: skip
SHORT = ["--config", "shapes_cpu", *(word for value in SHORT_VALUES for word in ("--set", value))]


@dataclass(frozen=True)
class RayHead:
    """A running head node.

    Attributes:
        url: of the dashboard and job API.
        agent_url: of the node's agent.
        client_url: of the Ray Client server.
        temp: Ray's folder: sessions, logs.
        environment: of a user who holds the token.
    """

    url: str
    agent_url: str
    client_url: str
    temp: Path
    environment: dict[str, str]

    def submit(self, *words: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """``ray job submit`` from the checkout, as the README prints it."""
        command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", *map(str, words)]
        return subprocess.run(
            command, env={**self.environment, **(environment or {})}, cwd=ROOT, capture_output=True, text=True,
            check=False, timeout=240,
        )  # fmt: skip

    def start(self, name: str, *words: object) -> None:
        """``ray job submit`` of a job that goes on by itself."""
        command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--no-wait", "--submission-id", name, "--"]
        self._run([*command, *words])

    def stop(self, name: str) -> str:
        """``ray job stop``; what the job printed."""
        self._run([BIN / "ray", "job", "stop", name])
        return self._run([BIN / "ray", "job", "logs", name])

    def _run(self, command: Sequence[object]) -> str:
        answer = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout


@dataclass(frozen=True)
class TrackingServer:
    """A running MLflow server.

    Attributes:
        address: host and port.
        folder: database and artifacts.
        pid: of the process that has the others below it.
    """

    address: str
    folder: Path
    pid: int

    @contextmanager
    def away(self) -> Iterator[None]:
        """Stop it: it takes connections and answers nothing."""
        processes = [self.pid, *descendants(self.pid)]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)


@dataclass(frozen=True)
class Cluster:
    """A running head and what its jobs work with.

    Attributes:
        head: the Ray head.
        folder: the operator's home, where shards and runs are.
        shards: a small shard set.
        tracking: the MLflow server.
        tracking_uri: of it, without the password.
        tracking_folder: its database and artifacts.
    """

    head: RayHead
    folder: Path
    shards: Path
    tracking: TrackingServer

    @property
    def tracking_uri(self) -> str:
        return f"http://{self.tracking.address}"

    @property
    def tracking_folder(self) -> Path:
        return self.tracking.folder


def plain_environment(home: Path) -> dict[str, str]:
    """This process's environment without what belongs to its own Ray and tracking, and another home."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_", "PYTEST_"))
    }
    return {**kept, "HOME": str(home), "PATH": f"{BIN}:{kept['PATH']}", "PYTHONUNBUFFERED": "1"}


@contextmanager
def ray_head(home: Path, token: str, extra: Mapping[str, str]) -> Iterator[RayHead]:
    """Start a head node and stop it again.

    Args:
        home: folder that stands for the operator's home; the token is put into it.
        token: of the cluster.
        extra: environment of every process of the cluster.
    """
    token_path = home / ".ray" / "auth_token"
    token_path.parent.mkdir(parents=True)
    token_path.write_text(token)
    token_path.chmod(0o600)
    # Sockets lie below Ray's folder, and their paths must be short.
    temp = Path(tempfile.mkdtemp(prefix="afa-ray-"))
    environment = {**plain_environment(home), "RAY_AUTH_MODE": "token", **extra}
    dashboard, agent, client = free_port(), free_port(), free_port()
    ports = [
        f"--{name}={free_port()}"
        for name in ("port", "metrics-export-port", "dashboard-agent-grpc-port",
                     "runtime-env-agent-port", "node-manager-port", "object-manager-port")
    ]  # fmt: skip
    command = [
        BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", *ports,
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temp}", "--object-store-memory=200000000",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    with (home / "ray-start.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home, start_new_session=True)
    try:
        wait_until(
            lambda: http_status(f"{url}/api/version") in ANSWERS, process, (home / "ray-start.log").read_text, 90
        )
        addresses = (url, f"http://127.0.0.1:{agent}", f"ray://127.0.0.1:{client}")
        yield RayHead(*addresses, temp, {**environment, "RAY_ADDRESS": url})
    finally:
        # Asked to stop, a node waits half a minute for its work. There is none.
        kill(session_members(process.pid))
        process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def session_members(leader: int) -> list[int]:
    """Processes that a session leader started, and itself."""
    table = subprocess.run(["ps", "-e", "-o", "pid=,sess="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
    return [pid for pid, session in pairs if session == leader]
