"""Training and labelling over two hosts with addresses of their own, fed from S3; one is cut off and returns."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from commands import afa_command
from hosts import BRIDGE_ADDRESS, Hosts, two_hosts
from labelling import picture
from mlflow import MlflowClient
from processes import descendants
from ray_head import plain_environment
from servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from shard_sets import write_shapes
from waiting import wait_until

from infra import object_store
from infra.object_store import list_objects, write_object
from pipelines.checkpoints import CheckpointStore

TOGETHER = "2 of 2 workers"
STEPS = 300  # they must last while a host goes and comes back
VALUES = [
    "optim.warmup_steps=0", "loss.classification_steps=8", "loss.affinity_label_step=16",
    "data.crop_px=64", "data.loader_workers=0", "train.batch_size=2", "train.min_workers=1", "train.eval_samples=4",
    "train.checkpoint_every=8", "train.log_every=4", "train.grow_check_s=1", "par.dilations=[1,2]", "par.iterations=2",
]  # fmt: skip


@pytest.fixture
def hosts(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Two hosts, an S3 server that both reach, shards and pictures in it, a tracking database.

    A model and what commands write into ``TMPDIR`` are on the first host alone.
    """
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_DEFAULT_REGION": "us-east-1"}
    environment = {
        **plain_environment(tmp_path), **keys, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "RAY_AUTH_TOKEN": "token-of-two-hosts", "AFA_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    with two_hosts(tmp_path, environment) as made, s3_server(tmp_path / "s3", BRIDGE_ADDRESS) as endpoint:
        for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        made.environment["AWS_ENDPOINT_URL"] = endpoint
        object_store._client.cache_clear()  # other tests had another server
        boto3.client("s3").create_bucket(Bucket="two")
        temporary_files(made).mkdir()
        made.hidden = [bundle, temporary_files(made)]
        for host in made.hosts:
            made.start_ray(host)
        made.wait_for_nodes(2)
        yield made
    object_store._client.cache_clear()


def temporary_files(hosts: Hosts) -> Path:
    """Where commands on the first host have theirs."""
    return hosts.folder / "own"


def run_on_first(hosts: Hosts, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    return hosts.hosts[0].start(command, {**hosts.environment, "TMPDIR": str(temporary_files(hosts))}, log)


def objects(prefix: str, suffix: str) -> list[str]:
    return [found.uri for found in list_objects(prefix) if found.uri.endswith(suffix)]


@contextmanager
def lone_worker_stopped(hosts: Hosts) -> Iterator[None]:
    head = hosts.hosts[0].sessions[0]
    workers = [pid for pid, command in descendants(head.pid).items() if "ray::RayTrainWorker" in command]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGSTOP)
    yield
    os.kill(workers[0], signal.SIGCONT)


def test_training_loses_a_host_goes_on_with_one_and_takes_it_back(hosts: Hosts, tmp_path: Path) -> None:
    shards, log = tmp_path / "shards", tmp_path / "train.log"
    write_shapes(shards, train=30, val=4, size_px=64, samples_per_shard=7)
    for path in shards.iterdir():
        write_object(f"s3://two/shards/{path.name}", path.read_bytes())
    settings = [
        word
        for value in (*VALUES, f"optim.total_steps={STEPS}", f"train.eval_every={STEPS}")
        for word in ("--set", value)
    ]
    command = afa_command("train", "s3://two/shards", "--config", "shapes_cpu", "--storage", "s3://two/runs",
                          "--run-name", "elastic", *settings)  # fmt: skip
    process = run_on_first(hosts, command, log)
    wait_until(lambda: TOGETHER in log.read_text(), process, log.read_text)
    wait_until(CheckpointStore("s3://two/runs/elastic/checkpoints").load_all, process, log.read_text)
    once = log.read_text().count(TOGETHER)  # Ray shows some lines twice
    hosts.lose_second()
    wait_until(lambda: "1 of 2 workers" in log.read_text(), process, log.read_text)
    with lone_worker_stopped(hosts):  # the run would be over before the second host is back
        hosts.return_second()
    wait_until(lambda: log.read_text().count(TOGETHER) >= 2 * once, process, log.read_text)
    assert process.wait(300) == 0, log.read_text()[-4000:]
    printed = log.read_text()
    assert "goes on from step" in printed
    assert f"best checkpoint s3://two/runs/elastic/checkpoints/step-{STEPS:08d}" in printed
    client = MlflowClient(hosts.environment["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("afa").experiment_id])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss.cls")
    assert [point.step for point in points] == list(range(STEPS))


def test_labelling_brings_the_model_to_a_host_loses_it_and_nothing_else(
    hosts: Hosts, bundle: Path, tmp_path: Path
) -> None:
    for index in range(300):
        write_object(f"s3://two/pictures/{index:03d}.png", picture(index, 128))
    log = tmp_path / "label.log"
    command = afa_command("label", "--model", bundle, "--input", "s3://two/pictures", "--output", "s3://two/labels",
                          "--unit-size", 4, "--workers", 2)  # fmt: skip
    process = run_on_first(hosts, command, log)
    wait_until(lambda: len(objects("s3://two/labels", ".done.json")) >= 4, process, log.read_text)
    hosts.lose_second()
    hosts.return_second()
    assert process.wait(300) == 0, log.read_text()[-4000:]
    assert "images 300  labels 300  quarantined 0" in log.read_text()
    verify = afa_command("verify-labels", "s3://two/labels")
    answer = subprocess.run(verify, env=hosts.environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
