"""``ray up``, ``ray submit`` and ``ray down`` with the on-premise file, over a real sshd on loopback.

The launcher runs ``ray stop``, which ends every Ray process of the user it can see, and writes to that user's home. So
all of it happens in namespaces of its own: processes, network, and mounts that put another home and another /tmp/ray in
place. "Machines" are 127.0.0.1 (head) and 127.0.0.2 (worker).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ray_head import BIN, ROOT, SHORT, plain_environment

PROGRAMS = ["unshare", "ip", "sshd", "ssh", "ssh-keygen", "rsync", "mount"]
SCRIPT = """
set -eu
ip link set lo up
mount --bind {folder}/passwd /etc/passwd
mount --bind {folder}/shadow /etc/shadow
mkdir -p /tmp/ray /run/sshd
mount --bind {folder}/ray /tmp/ray
sshd=$(command -v sshd || echo /usr/sbin/sshd)
$sshd -f {folder}/sshd_config -E {folder}/sshd.log
cd {root}
ray up -y {folder}/cluster.yaml
ray submit {folder}/cluster.yaml pipelines/build_shards.py -- shapes {folder}/shards {sizes}
ray submit {folder}/cluster.yaml pipelines/train.py -- {folder}/shards {short} --storage {folder}/runs --run-name one
ray exec {folder}/cluster.yaml 'ray list nodes --format json > {folder}/nodes.json'
ray submit {folder}/cluster.yaml pipelines/train.py -- {folder}/nowhere > {folder}/mistake.txt 2>&1 || true
ray down -y {folder}/cluster.yaml
pgrep raylet > {folder}/left.txt || true
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie below it."""
    path = Path(tempfile.mkdtemp(prefix="afa-ssh-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def check_possible() -> None:
    """Skip, saying why, where this cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("not root: no namespaces of one's own for ray up")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"ray submit was not tried: no {', '.join(missing)} (apt-get install openssh-server rsync)")
    tried = subprocess.run(["unshare", "--pid", "--mount-proc", "--net", "--fork", "ip", "link", "set", "lo", "up"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    if tried.returncode:
        pytest.skip(f"ray submit was not tried: {tried.stderr.strip()}")


def cluster_file(folder: Path) -> dict[str, Any]:
    """The shipped file with this machine as both machines, and an environment that is installed already."""
    cluster: dict[str, Any] = yaml.safe_load((ROOT / "infra" / "onprem" / "ray_cluster.yaml").read_text())
    cluster["cluster_name"] = folder.name
    cluster["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": ["127.0.0.2"]}
    cluster["auth"]["ssh_user"] = "root"
    chmod, environment, bashrc, venv, _ = cluster["setup_commands"]
    addresses = f"MLFLOW_TRACKING_URI=sqlite:///{folder}/mlflow.db PYTHONPATH=$HOME/afa-pipelines"
    environment = environment.replace("MLFLOW_TRACKING_URI=http://mlflow.example.internal:5000", addresses)
    assert addresses in environment
    assert "python3.11 -m venv" in venv
    cluster["setup_commands"] = [chmod, environment, bashrc, f"test -e ~/venv || ln -s {BIN.parent} ~/venv"]
    # Both machines are this one: stopping what runs on the second would stop the first.
    stop, start = cluster["worker_start_ray_commands"]
    assert stop == "ray stop"
    cluster["worker_start_ray_commands"] = [f"{start} --node-ip-address=127.0.0.2 --num-cpus=2"]
    return cluster


def prepare(folder: Path) -> None:
    """Another home with keys and token, another root account, and sshd's configuration."""
    for name in ("home/.ssh", "home/.ray", "ray", "tmp"):
        (folder / name).mkdir(parents=True)
    ssh = folder / "home" / ".ssh"
    for key in (ssh / "id_ed25519", folder / "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    ssh.chmod(0o700)
    (folder / "home" / ".ray" / "auth_token").write_text("token-of-the-cluster-over-ssh")
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("root:")]
    (folder / "passwd").write_text("\n".join([f"root:x:0:0:root:{folder}/home:/bin/bash", *others, ""]))
    (folder / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    lines = [
        "ListenAddress 0.0.0.0:22", f"HostKey {folder}/host_key", "PidFile none", "UsePAM no", "StrictModes no",
        "PermitRootLogin prohibit-password", "PasswordAuthentication no", "UseDNS no",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join([*lines, ""]))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_file(folder)))


def test_the_launcher_takes_a_cluster_up_runs_train_py_on_it_and_takes_it_down(folder: Path) -> None:
    check_possible()
    prepare(folder)
    script = SCRIPT.format(
        folder=folder, root=ROOT, short=" ".join(SHORT),
        sizes="--train 12 --val 6 --size-px 64 --samples-per-shard 6",
    )  # fmt: skip
    environment = plain_environment(folder / "home") | {"TMPDIR": str(folder / "tmp")}
    environment["PATH"] += ":/usr/sbin:/sbin"
    with (folder / "script.log").open("w") as log:
        done = subprocess.run(
            ["unshare", "--pid", "--mount", "--mount-proc", "--net", "--fork", "--kill-child", "bash", "-c", script],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False, timeout=500,
        )  # fmt: skip
    printed = (folder / "script.log").read_text()
    assert done.returncode == 0, printed[-6000:]

    assert "best checkpoint" in printed
    run_id = json.loads((folder / "runs" / "one" / "afa_run.json").read_text())["run_id"]
    assert MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(run_id).info.status == "FINISHED"
    nodes = json.loads((folder / "nodes.json").read_text())
    processors = {node["node_ip"]: node["resources_total"].get("CPU", 0) for node in nodes if node["state"] == "ALIVE"}
    assert processors == {"127.0.0.1": 0, "127.0.0.2": 2}
    assert "ip=127.0.0.2" in printed  # so the workers of the job were there, and not on the head
    mistake = (folder / "mistake.txt").read_text()
    assert "nowhere is no shard set" in mistake
    assert "Traceback" not in mistake
    assert (folder / "home" / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (folder / "left.txt").read_text() == ""
