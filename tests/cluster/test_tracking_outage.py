"""MLflow goes away and comes back: training does not wait for it, and no number is lost or there twice."""

from __future__ import annotations

import json
import time

from mlflow import MlflowClient
from ray_head import SHORT, Cluster, TrackingServer
from waiting import wait_until

from infra.history import HistorySender
from infra.tracking import RunLogger, answer_soon, open_run


def logged(tracking_uri: str, run_id: str) -> list[int]:
    return sorted(point.step for point in MlflowClient(tracking_uri).get_metric_history(run_id, "loss.cls"))


def test_what_an_outage_kept_back_is_sent_once_also_by_the_job_after(mlflow_server: TrackingServer) -> None:
    answer_soon()
    uri = f"http://{mlflow_server.address}"
    run = open_run(uri, "outage", "run", {}, {})
    first = HistorySender(RunLogger.attach(uri, run.run_id))
    for step in range(1000):  # more than one request takes
        first.add(step, {"loss.cls": 0.5, "lr": 0.1})
    first.send()
    wait_until(lambda: not first.unsent())
    with mlflow_server.away():
        began = time.monotonic()
        for step in range(1000, 1010):
            first.add(step, {"loss.cls": 0.5, "lr": 0.1})
        carried = first.unsent()  # as in the checkpoint of step 1010; then the job is killed
        assert time.monotonic() - began < 1
        second = HistorySender(RunLogger.attach(uri, run.run_id))
        second.take_up(carried)
        second.add(1010, {"loss.cls": 0.5, "lr": 0.1})
        assert "those of steps 1000 to 1010" in second.close(0.5)
        third = HistorySender(RunLogger.attach(uri, run.run_id))
        third.take_up(second.unsent())
        for step in (998, 999, 1011):  # two are done once more
            third.add(step, {"loss.cls": 0.5, "lr": 0.1})
        third.send()
    assert third.close(120) == ""
    assert logged(uri, run.run_id) == list(range(1012))


def test_a_server_that_is_gone_holds_nobody_up() -> None:
    sender = HistorySender(RunLogger.attach("http://127.0.0.1:9", "0" * 32))
    began = time.monotonic()
    sender.add(0, {"loss.cls": 0.5})
    sender.send()
    assert "1 entries (those of steps 0 to 0" in sender.close(0.5)
    assert time.monotonic() - began < 5


def test_training_goes_on_while_mlflow_is_away_and_a_stopped_job_is_recorded(cluster: Cluster) -> None:
    """``ray job stop`` sends SIGTERM, and SIGKILL three seconds later."""
    runs = cluster.folder / "stopped-runs"
    values = ["optim.total_steps=20000", "train.eval_every=20000", "train.checkpoint_every=4"]
    settings = [*SHORT, *(word for value in values for word in ("--set", value))]
    words = ["python", "-m", "pipelines.train", cluster.shards, *settings, "--storage", runs, "--run-name", "run"]
    cluster.head.start("stopped", *words)

    def newest() -> int:
        names = [path.name for path in (runs / "run").glob("checkpoints/step-*.json")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    try:
        wait_until(lambda: newest() > 0)
        run_id = json.loads((runs / "run" / "afa_run.json").read_text())["run_id"]
        with cluster.tracking.away():
            away_from = newest()
            # A log call of 20 s every second step would take 400 s.
            wait_until(lambda: newest() >= away_from + 40, timeout_s=100)
        back = newest()
        wait_until(lambda: max(logged(cluster.tracking_uri, run_id), default=0) >= back)
    finally:
        printed = cluster.head.stop("stopped")
    assert "interrupted: go on with --resume run" in printed
    run = MlflowClient(cluster.tracking_uri).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["afa.status"] == "interrupted"
    steps = logged(cluster.tracking_uri, run_id)
    assert steps == list(range(len(steps)))
