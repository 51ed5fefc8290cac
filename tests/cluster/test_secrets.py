"""What a training job and a labelling job leave behind, searched for the secrets that they were given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ray_head import MLFLOW_PASSWORD, SHORT, TOKEN, Cluster
from servers.s3 import SECRET_KEY

from infra.object_store import list_objects, read_object

# How each may be written: plain, and as the base64 of "name:password", which HTTP sends.
SECRETS = {"token": TOKEN.encode(), "MLflow password": MLFLOW_PASSWORD.encode(), "S3 key": SECRET_KEY.encode()}


def files_below(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()


def test_what_jobs_leave_behind_holds_no_secret(cluster: Cluster) -> None:
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

    printed = [("what was printed", (answer.stdout + answer.stderr).encode())
               for answer in (trained, failed, registered, labelled)]  # fmt: skip
    stored = [(found.uri, read_object(found.uri)[0]) for found in list_objects(output)]
    assert len(stored) > 3
    folders = [cluster.folder, cluster.head.temp, cluster.tracking_folder]
    searched = 0
    leaks = []
    for name, content in [*printed, *stored, *files_below(*folders)]:
        searched += 1
        if name == str(cluster.folder / ".ray" / "auth_token"):
            assert content == SECRETS["token"]  # so a search of this kind does find it
            continue
        leaks += [f"{secret} in {name}" for secret, value in SECRETS.items() if value in content]
    assert not leaks, "\n".join(leaks)
    assert searched > 100
    assert any(name.endswith("mlflow.db") for name, _ in files_below(cluster.tracking_folder))
    assert any("job-driver" in name for name, _ in files_below(cluster.head.temp))
