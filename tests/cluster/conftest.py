"""One real Ray head for the tests of this folder, which knows an MLflow server and an S3 server, both with secrets."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from processes import kill_tree
from ray_head import BIN, MLFLOW_PASSWORD, TOKEN, Cluster, TrackingServer, plain_environment, ray_head
from servers.s3 import ACCESS_KEY, SECRET_KEY, free_port
from shard_sets import write_shapes
from waiting import http_status, wait_until


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A real MLflow server; it does not mind which user name and password it is sent."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    command = [
        BIN / "mlflow", "server", "--host", host, "--port", port, "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "artifacts",
    ]  # fmt: skip
    # Without judges of language models: eight processes, 1.4 GiB.
    environment = {**plain_environment(folder), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    try:
        wait_until(
            lambda: http_status(f"http://{address}/health") == 200, process, (folder / "server.log").read_text, 120
        )
        yield TrackingServer(address, folder, process.pid)
    finally:
        kill_tree(process)  # asked politely it waits for open connections


@pytest.fixture(scope="session")
def cluster(mlflow_server: TrackingServer, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head whose processes are told the addresses and the secrets by their environment."""
    folder = tmp_path_factory.mktemp("operator")
    environment = {
        "MLFLOW_TRACKING_URI": f"http://afa:{MLFLOW_PASSWORD}@{mlflow_server.address}",
        "MLFLOW_TRACKING_USERNAME": "afa",
        "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
        "TMPDIR": str(folder / "tmp"),  # where a job's own temporary files can be searched
    }
    (folder / "tmp").mkdir()
    shards = folder / "shards"
    write_shapes(shards, train=12, val=6, size_px=64, samples_per_shard=6)
    with ray_head(folder, TOKEN, environment) as head:
        yield Cluster(head, folder, shards, mlflow_server)
