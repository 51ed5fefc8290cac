"""One real Ray head for the tests of this folder, which knows an MLflow server and an S3 server, both with secrets."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import BIN, MLFLOW_PASSWORD, TOKEN, Cluster, plain_environment, ray_head
from servers.s3 import ACCESS_KEY, SECRET_KEY, free_port


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of a real MLflow server; it does not mind which user name and password it is sent."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    command = [
        BIN / "mlflow", "server", "--host", host, "--port", port, "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", folder / "artifacts",
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=plain_environment(folder))
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://{address}/health"):
            assert process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield address, folder
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def cluster(mlflow_server: tuple[str, Path], s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head whose processes are told the addresses and the secrets by their environment."""
    address, tracking_folder = mlflow_server
    folder = tmp_path_factory.mktemp("operator")
    environment = {
        "MLFLOW_TRACKING_URI": f"http://afa:{MLFLOW_PASSWORD}@{address}",
        "MLFLOW_TRACKING_USERNAME": "afa",
        "MLFLOW_TRACKING_PASSWORD": MLFLOW_PASSWORD,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3,
    }
    shards = folder / "shards"
    sizes = ["--train", 12, "--val", 6, "--size-px", 64, "--samples-per-shard", 6]
    with ray_head(folder, TOKEN, environment) as head:
        packed = head.submit("python", "-m", "pipelines.build_shards", "shapes", shards, *sizes)
        assert packed.returncode == 0, packed.stdout + packed.stderr
        yield Cluster(head, folder, shards, f"http://{address}", tracking_folder)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True
