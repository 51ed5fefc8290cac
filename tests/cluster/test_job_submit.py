"""``ray job submit`` as the README prints it, against a running cluster that wants a token."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from mlflow import MlflowClient
from ray_head import SHORT, TOKEN, Cluster

TRAIN = ["python", "-m", "pipelines.train"]


def test_a_training_job_runs_on_the_cluster_that_is_there(cluster: Cluster) -> None:
    runs = cluster.folder / "runs"
    words = [*TRAIN, cluster.shards, *SHORT, "--storage", runs, "--run-name", "job", "--resume-existing"]
    answer = cluster.head.submit(*words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "succeeded" in answer.stdout
    run_id = json.loads((runs / "job" / "afa_run.json").read_text())["run_id"]
    run = MlflowClient(cluster.tracking_uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["afa.best_checkpoint"].startswith(str(runs / "job" / "checkpoints" / "step-"))
    assert list((runs / "job").glob("checkpoints/step-*/model.safetensors"))
    # It ran there and nowhere else: one Ray session in the cluster's folder, with the job's log in it.
    sessions = [path for path in cluster.head.temp.glob("session_2*") if path.is_dir()]
    assert len(sessions) == 1
    assert any("MLflow run" in log.read_text() for log in (sessions[0] / "logs").glob("job-driver-*.log"))


def test_the_same_command_again_goes_on_with_its_run(cluster: Cluster) -> None:
    """What a RayJob's backoffLimit does. Here the run of the test above is finished, so nothing is left to do."""
    runs = cluster.folder / "runs"
    again = [*TRAIN, cluster.shards, *SHORT, "--storage", runs, "--run-name", "job"]
    refused = cluster.head.submit(*again)
    assert "there is a run at" in refused.stdout
    answer = cluster.head.submit(*again, "--resume-existing")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    run_id = json.loads((runs / "job" / "afa_run.json").read_text())["run_id"]
    client = MlflowClient(cluster.tracking_uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run_id, "loss.cls")] == [0, 1, 2, 3, 4, 5]


def test_only_the_code_travels(cluster: Cluster) -> None:
    answer = cluster.head.submit("true")
    assert answer.returncode == 0, answer.stderr
    below = cluster.head.temp.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*")
    copies = [path for path in below if path.is_dir()]
    assert copies
    for copy in copies:
        names = {path.name for path in copy.iterdir()}
        assert {"pipelines", "infra", "afa_core"} <= names
        assert not names & {".git", ".venv", "tests", "docs", "runs", "work", "demo"}


def test_a_users_mistake_fails_the_job_with_its_one_line(cluster: Cluster) -> None:
    answer = cluster.head.submit(*TRAIN, cluster.shards, "--set", "optim.speed=1")
    assert answer.returncode == 1
    assert "error: the configuration: unknown key 'optim.speed'; known are lr" in answer.stdout
    assert "failed with exit code 2" in answer.stdout
    assert "Traceback" not in answer.stdout


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RAY_AUTH_TOKEN": "not-the-token-of-this-cluster"}, "Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
    ],
)
def test_without_the_token_nothing_is_submitted(cluster: Cluster, environment: dict[str, str], said: str) -> None:
    answer = cluster.head.submit("touch", cluster.folder / "was-here", environment=environment)
    assert answer.returncode != 0
    assert said in answer.stderr
    assert not (cluster.folder / "was-here").exists()


def test_ray_client_wants_the_token_too(cluster: Cluster) -> None:
    """Its port cannot be switched off on the command line."""
    address = cluster.head.client_url.removeprefix("ray://")
    code = f"import ray.util; ray.util.connect({address!r}, connection_retries=1); print('nodes', len(ray.nodes()))"
    for token, said in ((TOKEN, "nodes 1"), ("not-the-token-of-this-cluster", "")):
        for _ in range(3):  # Ray gives the server of a client seconds to start in, on whatever machine
            answer = subprocess.run(
                [sys.executable, "-c", code],
                env={**cluster.head.environment, "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": ""},
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            if "Starting Ray client server failed" not in answer.stderr:
                break
        assert (answer.returncode == 0) == bool(said), answer.stderr
        assert said in answer.stdout


def test_what_kubernetes_probes_answers_without_the_token(cluster: Cluster) -> None:
    head, agent = cluster.head.url, cluster.head.agent_url  # ports 8265 and 52365 of a pod
    for url in (f"{head}/api/gcs_healthz", f"{agent}/api/local_raylet_healthz"):
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"success" in answer.read()


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/api/v0/logs"])
def test_the_dashboard_tells_nothing_without_the_token(cluster: Cluster, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(cluster.head.url + path, timeout=10)
    assert refused.value.code == 401
