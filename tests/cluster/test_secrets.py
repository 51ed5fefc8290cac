"""What a training job and a labelling job leave behind, searched for the secrets that they were given."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import boto3
from ray_head import MLFLOW_PASSWORD, SHORT, TOKEN, Cluster
from servers.s3 import SECRET_KEY

from infra.object_store import list_objects, read_object

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


def test_what_jobs_leave_behind_holds_no_secret(cluster: Cluster) -> None:
    boto3.client("s3").create_bucket(Bucket="masks")
    python = ["python", "-m"]
    runs, output = cluster.folder / "secret-runs", "s3://masks/labels"
    trained = cluster.head.submit(
        *python, "pipelines.train", cluster.shards, *SHORT, "--storage", runs, "--run-name", "one"
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    run_id = json.loads((runs / "one" / "afa_run.json").read_text())["run_id"]
    # A job that fails says more than one that does not.
    failed = cluster.head.submit(
        *python, "pipelines.train", cluster.shards, *SHORT, "--storage", runs, "--run-name", "two",
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
    stored = [(found.uri, read_object(found.uri)[0]) for found in list_objects(output)]
    assert len(stored) > 3
    token_file = cluster.folder / ".ray" / "auth_token"
    searched, leaks = set(), []
    for name, content in [
        *printed, *stored, *files_below(cluster.folder, cluster.head.temp, cluster.tracking_folder)
    ]:  # fmt: skip
        searched.add(Path(name).name)
        leaks += [f"{secret} in {name}" for secret, value in SECRETS.items() if value in content]
    # The one place where a secret belongs, which also shows that the search finds what is there.
    assert leaks == [f"token in {token_file}"], "\n".join(leaks)
    assert {"mlflow.db", "afa_run.json", "config.json", "gcs_server.out", "raylet.out", "server.log"} <= searched
