"""Training through the loss of processes, of the store, of data: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import boto3
import pytest
from commands import afa, afa_running
from mlflow import MlflowClient
from processes import descendants
from servers.fault_proxy import fault_proxy

from infra.object_store import list_objects, write_object

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
    afa("shards", "shapes", folder, "--train", 30, "--val", 4, "--size-px", 64, "--samples-per-shard", 7)
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("undisturbed")
    printed = afa(*words(shards, storage), "--run-name", "run")
    assert "was the bottleneck" in printed
    return storage / "run"


def saved(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step-{step:08d}.json").is_file()


def final_weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-00000024" / "model.safetensors").read_bytes()


def run_id(run: Path) -> str:
    return str(json.loads((run / "afa_run.json").read_text())["run_id"])


def losses(run: Path) -> list[tuple[int, float]]:
    points = MlflowClient().get_metric_history(run_id(run), "loss.cls")
    return [(point.step, point.value) for point in points]


def workers_below(pid: int) -> list[int]:
    """The two of a job; their loading processes carry their name too."""
    named = {child for child, command in descendants(pid).items() if WORKER in command}
    found = [child for child in named if parent_of(child) not in named]
    assert len(found) == 2
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def whole_group_killed(pid: int) -> Iterator[None]:
    """Kill a driver with all below it, Ray included, and wait until they are gone."""
    below = descendants(pid)
    os.killpg(pid, signal.SIGKILL)
    for process in below:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    yield


def test_a_killed_job_goes_on_and_ends_with_the_same_weights(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = words(shards, tmp_path)
    with afa_running(*command, "--run-name", "run", until=partial(saved, run, 8)) as process:
        for worker in workers_below(process.pid):
            os.kill(worker, signal.SIGSTOP)  # the run would be over before the second driver has begun
        assert "another driver is at work" in afa(*command, "--resume", "run", status=2)
        with whole_group_killed(process.pid):
            process.wait()
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


def test_from_a_store_that_fails_and_refuses_the_weights_are_the_same(
    undisturbed: Path, shards: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards from S3, checkpoints to it; 5 % of the requests fail, and for 20 s all of them."""
    boto3.client("s3").create_bucket(Bucket="training")
    for path in shards.iterdir():
        write_object(f"s3://training/shards/{path.name}", path.read_bytes())
    monkeypatch.setenv("AFA_CACHE", str(tmp_path / "cache"))
    markers = "s3://training/runs/run/checkpoints"

    def begun() -> bool:
        return any(re.search(r"/step-\d+\.json$", found.uri) for found in list_objects(markers))

    with fault_proxy(s3, 0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        command = words("s3://training/shards", "s3://training/runs")
        with afa_running(*command, "--run-name", "run", until=begun) as process:
            proxy.closed_until = time.monotonic() + 20
            printed, error = process.communicate(timeout=250)
        assert proxy.counts["503"] > 10
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert process.returncode == 0, error[-3000:]
    final = "s3://training/runs/run/checkpoints/step-00000024"
    assert f"best checkpoint {final}" in printed
    scored = afa("evaluate", final, "s3://training/shards")
    assert scored == afa("evaluate", undisturbed / "checkpoints" / "step-00000024", shards)


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
