"""The head is killed, with the driver on it, and started anew on the same Redis; the other host goes on as it was.

A head alone knows its cluster again (GCS fault tolerance). The driver died with it, so the job is resumed, while the
workers of before are still there: they were stopped in the middle and wake up beside those that took their run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commands import afa_command
from hosts import BRIDGE_ADDRESS, Hosts, two_hosts
from mlflow import MlflowClient
from processes import descendants, kill_tree
from ray_head import plain_environment
from servers.redis import redis_server
from shard_sets import write_shapes
from waiting import wait_until

WORKER = "ray::RayTrainWorker"
VALUES = [
    "optim.total_steps=60", "optim.warmup_steps=0", "loss.classification_steps=40", "loss.affinity_label_step=50",
    "data.crop_px=64", "data.loader_workers=0", "train.batch_size=2", "train.eval_every=60", "train.eval_samples=4",
    "train.checkpoint_every=4", "train.log_every=4", "par.dilations=[1,2]", "par.iterations=2",
]  # fmt: skip


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    environment = {
        **plain_environment(tmp_path), "RAY_AUTH_TOKEN": "token-of-the-restarted",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
    }  # fmt: skip
    with two_hosts(tmp_path, environment) as made, redis_server(tmp_path, BRIDGE_ADDRESS) as redis:
        made.keep_state_in(redis)
        made.processors, made.apart = (0, 2), True
        made.environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "120"  # no machine is lost that workers wait for
        yield made


def steps(run: Path) -> dict[int, str]:
    """Checkpoints that are there, with the group of workers that made each."""
    names = [path.stem.split("-") for path in run.glob("checkpoints/step-*.json")]
    return {int(step): group for _, step, group in names}


def weights(run: Path) -> bytes:
    (folder,) = (run / "checkpoints").glob("step-00000060-*/")
    return (folder / "model.safetensors").read_bytes()


def test_a_restarted_head_finds_its_host_and_the_job_ends_as_if_nothing_had_been(hosts: Hosts, tmp_path: Path) -> None:
    shards, log, runs = tmp_path / "shards", tmp_path / "train.log", tmp_path / "runs"
    write_shapes(shards, train=30, val=4, size_px=64, samples_per_shard=7)
    settings = [word for value in VALUES for word in ("--set", value)]
    command = afa_command("train", shards, "--config", "shapes_cpu", "--storage", runs, *settings)
    first, second = hosts.hosts
    head = hosts.start_ray(first)
    hosts.wait_for_nodes(1)
    other = hosts.start_ray(second)
    hosts.wait_for_nodes(2)

    undisturbed = first.start([*command, "--run-name", "undisturbed"], hosts.environment, log)
    assert undisturbed.wait(250) == 0, log.read_text()[-4000:]
    driver = first.start([*command, "--run-name", "run"], hosts.environment, log)
    wait_until(lambda: steps(runs / "run"), driver, log.read_text, 120)
    orphans = [pid for pid, words in descendants(other.pid).items() if WORKER in words]
    for pid in orphans:
        os.kill(pid, signal.SIGSTOP)
    assert len(orphans) == 2
    assert 60 not in steps(runs / "run")
    for process in (head, driver):  # the machine: GCS, raylet, dashboard, driver
        kill_tree(process)
    hosts.restart_head()
    hosts.wait_for_nodes(2)
    assert other.poll() is None  # no new node: the one that was there

    resumed = first.start([*command, "--resume", "run"], hosts.environment, log)
    started = set(steps(runs / "run").values())
    wait_until(
        lambda: set(steps(runs / "run").values()) > started, resumed, lambda: log.read_text() + hosts.status(), 120
    )
    for pid in orphans:  # wake up those that Ray has not ended
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert resumed.wait(200) == 0, log.read_text()[-4000:]
    assert "goes on from step" in log.read_text()
    assert weights(runs / "run") == weights(runs / "undisturbed")
    assert len(set(steps(runs / "run").values()) - started) == 1
    client = MlflowClient(hosts.environment["MLFLOW_TRACKING_URI"])
    found = client.search_runs([client.get_experiment_by_name("afa").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["run", "undisturbed"]
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in found:
        points = client.get_metric_history(run.info.run_id, "loss.cls")
        assert [point.step for point in points] == list(range(60))
