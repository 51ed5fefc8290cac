"""Training through the loss of processes, of the store, of data: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import boto3
import pytest
from commands import afa, afa_running
from mlflow import MlflowClient
from processes import descendants, kill_tree, stat_fields
from ray.train import ScalingConfig
from servers.fault_proxy import fault_proxy
from shard_sets import write_shapes

from infra import object_store
from infra.errors import ServiceError
from infra.object_store import list_objects, read_object, write_object
from infra.tracking import open_run
from pipelines import patience, train
from pipelines.checkpoints import CheckpointStore
from pipelines.config import ExperimentConfig
from pipelines.shard_store import load_shard_set
from pipelines.training import WorkerSettings

pytestmark = pytest.mark.usefixtures("tracking")

WORKER = "ray::RayTrainWorker"
VALUES = [
    "optim.total_steps=24", "optim.warmup_steps=0", "loss.classification_steps=8", "loss.affinity_label_step=16",
    "data.crop_px=64", "data.shuffle_block=4", "data.loader_workers=1", "train.batch_size=2", "train.eval_every=24",
    "train.eval_samples=4", "train.checkpoint_every=4", "train.log_every=4", "par.dilations=[1,2]",
    "par.iterations=2",
]  # fmt: skip


def words(dataset: object, storage: object, *values: str) -> list[object]:
    settings = [word for value in (*VALUES, *values) for word in ("--set", value)]
    return ["train", dataset, "--config", "shapes_cpu", "--storage", storage, *settings]


@pytest.fixture(scope="module", autouse=True)
def own_ray() -> Iterator[None]:
    """Every command on a Ray of its own, which is killed with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    write_shapes(folder, train=30, val=4, size_px=64, samples_per_shard=7)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    printed = afa(*words(shards, storage), "--run-name", "run")
    assert "was the bottleneck" in printed
    assert "State API" not in printed  # which Ray Train misses every second where Ray has no dashboard
    return storage / "run"


def newest(run: object) -> int:
    """Step of the newest checkpoint that is there."""
    if isinstance(run, Path):
        names = [path.name for path in run.glob("checkpoints/step-*.json")]
    else:
        names = [found.uri for found in list_objects(f"{run}/checkpoints")]
    return max((int(step) for name in names for step in re.findall(r"step-(\d+)-\w+\.json$", name)), default=0)


def saved(run: Path, step: int) -> bool:
    return newest(run) >= step


def final_weights(run: object) -> bytes:
    (last,) = [saved for saved in CheckpointStore(f"{run}/checkpoints").load_all() if saved.step == 24]
    return read_object(f"{last.uri}/model.safetensors")[0]


def run_id(run: Path) -> str:
    return str(json.loads((run / "afa_run.json").read_text())["run_id"])


def losses(run: Path) -> list[tuple[int, float]]:
    points = MlflowClient().get_metric_history(run_id(run), "loss.cls")
    return [(point.step, point.value) for point in points]


def workers_below(pid: int) -> list[int]:
    """The two of a job; their loading processes carry their name too."""
    named = {child for child, command in descendants(pid).items() if WORKER in command}
    found = [child for child in named if int(stat_fields(child)[1]) not in named]
    assert len(found) == 2
    return found


def test_a_killed_job_goes_on_and_ends_with_the_same_weights(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = words(shards, tmp_path)
    with afa_running(*command, "--run-name", "run", until=partial(saved, run, 8)) as process:
        for worker in workers_below(process.pid):
            os.kill(worker, signal.SIGSTOP)  # the run would be over before the second driver has begun
        assert "another driver is at work" in afa(*command, "--resume", "run", status=2)
        kill_tree(process)
    printed = afa(*command, "--resume", "run")
    assert "goes on from step" in printed
    assert final_weights(run) == final_weights(undisturbed)
    assert losses(run) == losses(undisturbed)
    assert MlflowClient().get_run(run_id(run)).info.status == "FINISHED"


def test_a_killed_worker_is_started_anew_in_the_same_run(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with afa_running(*words(shards, tmp_path), "--run-name", "run", until=partial(saved, run, 8)) as process:
        os.kill(workers_below(process.pid)[1], signal.SIGKILL)
        printed, error = process.communicate(timeout=200)
    assert process.returncode == 0, error[-3000:]
    assert "goes on from step" in printed
    assert final_weights(run) == final_weights(undisturbed)
    assert losses(run) == losses(undisturbed)


def steps_done(printed: str) -> int:
    return max(map(int, re.findall(r"step (\d+)/24", printed)), default=0)


def test_a_slow_store_that_refuses_for_a_minute_costs_one_interval_and_no_bit(
    undisturbed: Path, shards: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards from S3, checkpoints to it; 5 % of the requests fail, for a minute all of them; then everything is killed.

    At any time the steps that were done are at most ``train.checkpoint_every`` more than those that are safe.
    """
    boto3.client("s3").create_bucket(Bucket="training")
    for path in shards.iterdir():
        write_object(f"s3://training/shards/{path.name}", path.read_bytes())
    monkeypatch.setenv("AFA_CACHE", str(tmp_path / "cache"))
    run, log = "s3://training/runs/run", tmp_path / "train.log"
    command = words("s3://training/shards", "s3://training/runs", "train.log_every=1")
    with fault_proxy(s3, 0.05) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        proxy.write_delay_s = 0.5  # an upload of four objects takes longer than an interval
        with afa_running(*command, "--run-name", "run", until=lambda: newest(run) > 0, log=log) as process:
            proxy.closed_until = time.monotonic() + 60
            while newest(run) < 12:
                done = steps_done(log.read_text())  # first, so that what became safe meanwhile is no excuse
                assert done - newest(run) <= 4
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.1)
            kill_tree(process)
            assert steps_done(log.read_text()) - newest(run) <= 4
        assert proxy.counts["503"] > 10
    printed = afa(*command, "--resume", "run")
    assert "goes on from step" in printed
    assert final_weights(run) == final_weights(undisturbed)


def test_a_store_that_is_away_is_no_mistake_of_the_users(
    shards: Path, s3: str, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run ends, and as workers start: a failure, which the MLflow run says; not "no shard set", not status 2."""
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    monkeypatch.setattr(patience, "RETRY_S", 0.0)
    with fault_proxy(s3, 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        object_store._client.cache_clear()
        proxy.closed_until = time.monotonic() + 1000
        with pytest.raises(ServiceError, match="does not answer"):
            load_shard_set("s3://training/shards")
        logger = open_run(tracking, "afa", "ends-in-an-outage", {}, {})
        settings = WorkerSettings({}, str(shards), "s3://training/runs/away", "driver", tracking, logger.run_id)
        # The workers have done their part, and rank 0 has returned.
        monkeypatch.setattr(train, "train", lambda *_: {"speed": "compute was the bottleneck", "unsent": ""})
        assert train.finish(settings, ScalingConfig(), logger, ExperimentConfig(), "away") == 1
    object_store._client.cache_clear()
    run = MlflowClient(tracking).get_run(logger.run_id)
    assert run.info.status == "FAILED"
    assert "cannot list s3://training/runs/away/checkpoints" in run.data.tags["afa.error"]


def test_a_shard_that_goes_bad_later_is_skipped_or_stops_the_run(shards: Path, tmp_path: Path) -> None:
    """In the third epoch; the first command allows any share of bad samples, the second the default."""
    for name, values, status in (("tolerant", ["data.max_bad_share=1"], 0), ("strict", [], 2)):
        dataset, run = tmp_path / f"{name}-set", tmp_path / name
        shutil.copytree(shards, dataset)
        command = words(dataset, tmp_path, "optim.total_steps=48", "train.eval_every=48", *values)
        with afa_running(*command, "--run-name", name, until=partial(saved, run, 20)) as process:
            damaged = dataset / "train-000001.tar"
            with damaged.open("r+b") as stream:
                stream.truncate(2000)
            printed, error = process.communicate(timeout=200)
        assert process.returncode == status, error[-3000:]
        outcome = MlflowClient().get_run(run_id(run))
        if status:
            assert "training samples cannot be used (data.max_bad_share=0.01): {'bad_shard':" in error
            assert outcome.info.status == "FAILED"
        else:
            assert "bad_shard" in printed
            assert outcome.data.metrics["data.skipped"] >= 7
            assert outcome.info.status == "FINISHED"
