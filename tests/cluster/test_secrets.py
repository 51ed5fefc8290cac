"""What a training job and a labelling job leave behind, searched for the secrets that they were given."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3
from ray_head import MLFLOW_PASSWORD, SHORT, TOKEN, Cluster
from servers.s3 import SECRET_KEY
from waiting import wait_until

from infra.object_store import list_objects, read_object, write_object
from pipelines.checkpoints import CheckpointStore

SECRETS = {
    "token": TOKEN.encode(),
    "MLflow password": MLFLOW_PASSWORD.encode(),
    "MLflow password, as HTTP sends it": base64.b64encode(f"afa:{MLFLOW_PASSWORD}".encode()),
    "S3 key": SECRET_KEY.encode(),
}


def files_below(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def kill_driver(cluster: Cluster, until: str) -> None:
    """Kill the job's driver as soon as there is a whole checkpoint; Ray ends its workers."""
    wait_until(CheckpointStore(until).load_all)
    table = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    drivers = [line.split()[0] for line in table.splitlines() if f"--run-name {cluster.folder.name}" in line]
    assert drivers
    for pid in drivers:
        os.kill(int(pid), signal.SIGKILL)


def test_what_jobs_leave_behind_holds_no_secret(cluster: Cluster) -> None:
    boto3.client("s3").create_bucket(Bucket="masks")
    python = ["python", "-m"]
    shards, runs, output = "s3://masks/shards", "s3://masks/runs", "s3://masks/labels"
    for path in cluster.shards.iterdir():
        write_object(f"{shards}/{path.name}", path.read_bytes())
    # From S3 to S3, killed on the way: what it had no time to clear away is searched too.
    long = ["--set", "optim.total_steps=60", "--set", "train.eval_every=60", "--set", "train.checkpoint_every=2"]
    words = [*python, "pipelines.train", shards, *SHORT, *long, "--storage", runs]
    cluster.head.start("killed", *words, "--run-name", cluster.folder.name)
    kill_driver(cluster, until=f"{runs}/{cluster.folder.name}/checkpoints")
    trained = cluster.head.submit(*words, "--resume", cluster.folder.name)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "goes on from step" in trained.stdout
    run_id = json.loads(read_object(f"{runs}/{cluster.folder.name}/afa_run.json")[0])["run_id"]
    # A job that fails says more than one that does not.
    failed = cluster.head.submit(
        *python, "pipelines.train", cluster.shards, *SHORT, "--storage", cluster.folder / "runs", "--run-name", "two",
        "--set", "optim.lr=1.0e+30",
    )  # fmt: skip
    assert "loss is not finite" in failed.stdout
    registered = cluster.head.submit(*python, "pipelines.cli", "register", run_id, "--name", "shapes")
    assert registered.returncode == 0, registered.stdout + registered.stderr
    labelled = cluster.head.submit(
        *python, "pipelines.pseudo_label", "--model", "models:/shapes@champion", "--input", cluster.shards,
        "--output", output,
    )  # fmt: skip
    assert labelled.returncode == 0, labelled.stdout + labelled.stderr
    assert "labels 18" in labelled.stdout

    answers = {"training": trained, "failing": failed, "registering": registered, "labelling": labelled}
    printed = [(f"what {job} printed", (answer.stdout + answer.stderr).encode()) for job, answer in answers.items()]
    stored = [(found.uri, read_object(found.uri)[0]) for found in list_objects("s3://masks")]
    assert len(stored) > 10
    token_file = cluster.folder / ".ray" / "auth_token"
    searched, leaks = set(), []
    for name, content in [
        *printed, *stored, *files_below(cluster.folder, cluster.head.temp, cluster.tracking_folder)
    ]:  # fmt: skip
        searched.add(Path(name).name)
        leaks += [f"{secret} in {name}" for secret, value in SECRETS.items() if value in content]
    # The one place where a secret belongs, which also shows that the search finds what is there.
    assert leaks == [f"token in {token_file}"], "\n".join(leaks)
    assert list((cluster.folder / "tmp").glob("afa-cache-*/*.tar"))
    assert {"mlflow.db", "afa_run.json", "config.json", "gcs_server.out", "raylet.out", "server.log"} <= searched
