"""The main job through the ``afa`` command, on a real local Ray and MLflow, and its outputs through other readers."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import webdataset as wds
from commands import afa, afa_running
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score

from afa_core.checkpoint import load_bundle
from afa_core.data.shapes import draw
from afa_core.data.shards import iterate_samples, load_dataset_index, shard_paths
from afa_core.labelling import label_pictures
from pipelines import cli
from pipelines.scoring import score_bundle

pytestmark = pytest.mark.usefixtures("local_ray", "tracking")

SHORT = [
    "optim.total_steps=6", "optim.warmup_steps=0", "loss.classification_steps=2", "loss.affinity_label_step=4",
    "data.crop_px=64", "train.batch_size=2", "train.eval_every=3", "train.eval_samples=4", "train.log_every=2",
    "par.dilations=[1,2]", "par.iterations=2",
]  # fmt: skip


def overrides(*extra: str) -> list[str]:
    return [word for value in (*SHORT, *extra) for word in ("--set", value)]


@pytest.fixture(scope="session")
def shards(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    afa("shards", "shapes", folder, "--train", 24, "--val", 8, "--size-px", 64, "--samples-per-shard", 6)
    return folder


@pytest.fixture(scope="session")
def runs(shards: Path, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the finished two-worker run "one"."""
    folder = tmp_path_factory.mktemp("runs")
    settings = overrides("speed.profile_steps=1")
    printed = afa("train", shards, "--config", "shapes_cpu", "--storage", folder, "--run-name", "one", *settings)
    assert "step 1/6" in printed
    assert "ETA" in printed
    return folder


@pytest.fixture(scope="session")
def run_id(runs: Path) -> str:
    return str(json.loads((runs / "one" / "afa_run.json").read_text())["run_id"])


@pytest.fixture(scope="session")
def champion(run_id: str) -> str:
    assert "champion is now version 1" in afa("register", run_id, "--name", "shapes")
    return "models:/shapes@champion"


def test_training_starts_from_a_checkpoint_beside_the_command(
    shards: Path, published: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the workers, in folders of their own, do not know where it is."""
    encoder = {name: value for name, value in published.items() if name.startswith("encoder.")}
    torch.save({name.removeprefix("encoder."): value for name, value in encoder.items()}, tmp_path / "mit_b0.pth")
    monkeypatch.chdir(tmp_path)
    settings = overrides("model.backbone=mit_b0", "model.pretrained=mit_b0.pth", "optim.total_steps=1", "optim.lr=1e-9",
                         "loss.classification_steps=1", "loss.affinity_label_step=1", "train.eval_every=1")  # fmt: skip
    printed = afa("train", shards, "--config", "shapes_cpu", "--storage", "runs", "--run-name", "begun", *settings)
    weights = load_file(Path(printed.split("best checkpoint ")[1].split()[0]) / "model.safetensors")
    torch.testing.assert_close(weights["backbone.stages.0.merging.projection.weight"],
                               encoder["encoder.patch_embed1.proj.weight"])  # fmt: skip


def test_shards_are_read_by_webdataset_and_are_the_same_bytes_again(shards: Path, tmp_path: Path) -> None:
    index = load_dataset_index(shards)
    urls = [str(path) for path in shard_paths(shards, index, "train")]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == index.splits["train"].samples == 24
    for sample in samples:
        number = int(sample["__key__"].rsplit("-", 1)[1])
        drawn = draw(0, number, 64)
        assert json.loads(sample["json"])["tags"] == list(drawn.tags)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), drawn.image)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["seg.png"]))), drawn.label)
    again = tmp_path / "again"
    afa("shards", "shapes", again, "--train", 24, "--val", 8, "--size-px", 64, "--samples-per-shard", 6)
    for path in shards.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_finished_run_has_losses_scores_pictures_and_a_checkpoint(run_id: str, shards: Path) -> None:
    client = MlflowClient()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.total_steps"] == "6"
    assert not [key for key in run.data.params if key.startswith("tracking")]  # may hold a password
    assert [point.step for point in client.get_metric_history(run_id, "loss.cls")] == [0, 1, 2, 3, 4, 5]
    assert [point.step for point in client.get_metric_history(run_id, "val.segmentation_miou")] == [3, 6]
    wanted = {"loss.seg", "loss.aff", "lr", "images_per_s", "val.cam_miou", "val.affinity_cam_miou", "val.tag_f1"}
    assert wanted <= set(run.data.metrics)
    pictures = [item.path for item in client.list_artifacts(run_id, "pictures")]
    assert pictures == ["pictures/step-000003.png", "pictures/step-000006.png"]
    profiles = [item.path for item in client.list_artifacts(run_id, "profiles")]
    assert profiles == ["profiles/step-000003.json.gz", "profiles/step-000003.txt"]
    trace = Path(client.download_artifacts(run_id, profiles[0])).read_bytes()
    assert json.loads(gzip.decompress(trace))["traceEvents"]
    checkpoint = Path(run.data.tags["afa.best_checkpoint"])
    assert {path.name for path in checkpoint.iterdir()} >= {
        "model.safetensors", "config.json", "training_state.pt",
    }  # fmt: skip
    assert load_bundle(checkpoint).classes == load_dataset_index(shards).classes


def test_scores_are_scikit_learns(run_id: str, shards: Path) -> None:
    """The project's mIoU of its labels against scikit-learn's, from the pixels up."""
    checkpoint = Path(MlflowClient().get_run(run_id).data.tags["afa.best_checkpoint"])
    bundle, index = load_bundle(checkpoint), load_dataset_index(shards)
    truths, labels = [], []
    for sample in iterate_samples(shard_paths(shards, index, "val"), index.classes, with_seg=True):
        assert sample.seg_label is not None
        truths.append(sample.seg_label.ravel())
        labels.append(label_pictures(bundle, [sample.image], [sample.tags])[0].label.ravel())
    truth, label = np.concatenate(truths), np.concatenate(labels)
    present = sorted(set(truth.tolist()) | set(label.tolist()))
    expected = jaccard_score(truth, label, labels=present, average="macro")
    assert score_bundle(checkpoint, str(shards))["refined_affinity_miou"] == pytest.approx(expected, abs=1e-3)


def checkpoints(run: Path, least: int) -> bool:
    return len(list(run.glob("checkpoints/step-*.json"))) >= least


def test_an_interrupted_run_goes_on_in_the_same_mlflow_run(shards: Path, tmp_path: Path) -> None:
    words = ["train", shards, "--config", "shapes_cpu", "--storage", tmp_path]
    longer = overrides("optim.total_steps=16", "train.workers=1", "train.eval_every=2")
    two = partial(checkpoints, tmp_path / "killed", 2)
    with afa_running(*words, "--run-name", "killed", *longer, until=two) as process:
        os.killpg(process.pid, signal.SIGKILL)
    first = json.loads((tmp_path / "killed" / "afa_run.json").read_text())["run_id"]
    assert "was started with another configuration" in afa(*words, "--resume", "killed", *overrides(), status=2)
    printed = afa(*words, "--resume", "killed", *longer)
    assert f"MLflow run {first}" in printed
    steps = [point.step for point in MlflowClient().get_metric_history(first, "val.cam_miou")]
    assert steps[-1] == 16
    assert MlflowClient().get_run(first).info.status == "FINISHED"
    assert len(steps) == len(set(steps)) == 8
    assert "there is a run at" in afa(*words, "--run-name", "killed", *longer, status=2)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_interrupts_training_reads_how_to_go_on(
    sent: signal.Signals, status: int, shards: Path, tmp_path: Path
) -> None:
    words = ["train", shards, "--config", "shapes_cpu", "--storage", tmp_path, "--run-name", "stopped"]
    one = partial(checkpoints, tmp_path / "stopped", 1)
    with afa_running(*words, *overrides("optim.total_steps=1000"), until=one) as process:
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "interrupted: go on with --resume stopped" in error
    run = MlflowClient().get_run(json.loads((tmp_path / "stopped" / "afa_run.json").read_text())["run_id"])
    assert run.info.status == "KILLED"


def test_what_is_not_finite_stops_training_and_spoils_no_checkpoint(shards: Path, tmp_path: Path) -> None:
    """From step 4 on the segmentation loss counts, so much that gradients overflow."""
    values = ["loss.segmentation_weight=3.0e+38", "loss.classification_steps=4", "train.checkpoint_every=4",
              "train.eval_every=20", "train.workers=1", "optim.total_steps=20"]  # fmt: skip
    words = ["train", shards, "--config", "shapes_cpu", "--storage", tmp_path, *overrides(*values)]
    printed = afa(*words, "--run-name", "diverges", status=1)
    assert re.search(r"training failed: gradient norm is (inf|nan) at step 4", printed)
    folders = list((tmp_path / "diverges").glob("checkpoints/step-*/"))
    assert sorted(folder.name[:13] for folder in folders) == ["step-00000002", "step-00000004"]
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        tensors |= dict(optimizer_tensors(torch.load(folder / "training_state.pt", weights_only=True)))
        assert len(tensors) > 100
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    run = MlflowClient().get_run(json.loads((tmp_path / "diverges" / "afa_run.json").read_text())["run_id"])
    assert run.info.status == "FAILED"
    assert "gradient norm" in run.data.tags["afa.error"]
    assert "goes on from step 4" in afa(*words, "--resume", "diverges", status=1)


def optimizer_tensors(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                yield f"{number}.{name}", value


def test_registered_model_loads_through_plain_mlflow(champion: str, run_id: str) -> None:
    loaded = mlflow.pyfunc.load_model(champion)
    buffer = io.BytesIO()
    Image.fromarray(draw(5, 0, 64).image).save(buffer, "PNG")
    table = pd.DataFrame({"image": [buffer.getvalue()] * 2, "tags": ['["disc"]', None]})
    answer = loaded.predict(table)
    assert json.loads(answer["tags"][0]) == ["disc"]
    assert list(answer["tags_source"]) == ["given", "predicted"]
    assert Image.open(io.BytesIO(answer["mask"][0])).size == (64, 64)
    assert "is models:/shapes/1 already" in afa("register", run_id, "--name", "shapes")
    listed = json.loads(afa("models", "--json"))
    assert [(row["name"], row["version"], row["aliases"]) for row in listed] == [("shapes", 1, ["champion"])]
    assert listed[0]["scores"].keys() >= {"segmentation_miou", "cam_miou"}


def test_champion_moves_only_to_a_better_score(champion: str, run_id: str, tracking: str) -> None:
    """Two more runs with the first one's checkpoint, one said to be worse and one better."""
    client = MlflowClient()
    first = client.get_run(run_id)
    for score, outcome in ((-1.0, "champion stays version 1"), (2.0, "champion moved from version 1")):
        tags = {key: value for key, value in first.data.tags.items() if key.startswith("afa.")}
        other = client.create_run(first.info.experiment_id, tags=tags)
        client.log_metric(other.info.run_id, "best.refined_affinity_miou", score)
        assert outcome in afa("register", other.info.run_id, "--name", "shapes")
    assert client.get_model_version_by_alias("shapes", "champion").version in (3, "3")
    client.set_registered_model_alias("shapes", "champion", "1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere"], "nowhere is no shard set"),
        (["train", "SHARDS", "--set", "optim.lr=fast"], "optim.lr = 'fast'"),
        (["train", "SHARDS", "--set", "optim.speed=1"], "unknown key 'optim.speed'; known are lr"),
        (["train", "SHARDS", "--set", "optim.lr"], "write section.key=value"),
        (["train", "SHARDS", "--set", "cam.background_score=2"], "cam.background_score = 2"),
        (["train", "SHARDS", "--config", "nothing"], "no configuration 'nothing'"),
        (["train", "SHARDS", "--set", "train.workers=99"], "train.workers=99, but the cluster has"),
        (["train", "SHARDS", "--set", "train.min_workers=3"], "min_workers must not be above workers"),
        (["train", "SHARDS", "--set", "model.pretrained=x.pth"], "no checkpoint at x.pth"),
        (["train", "SHARDS", "--resume", "nothing"], "no interrupted run at"),
        (["register", "0123", "--name", "x"], "no run '0123'"),
        (["models", "nothing"], "no registered model 'nothing'"),
        (["label", "--model", "models:/no@champion", "--input", ".", "--output", "out"], "no model models:/no@"),
        (["label", "--model", "models:/x", "--input", ".", "--output", "out"], "write models:/NAME@ALIAS"),
        (["label", "--model", "models:x", "--input", ".", "--output", "out"], "write models:/NAME@ALIAS"),
        (["label", "--model", "nowhere", "--input", ".", "--output", "out"], "nowhere holds no usable model: it has"),
        (["label", "--model", "x", "--input", "nowhere", "--output", "out"], "no such input"),
        (["label", "--model", "x", "--input", __file__, "--output", "out"], "cannot be taken as input"),
        (["evaluate", "nowhere", "SHARDS"], "holds no usable model"),
        (["shards", "voc", "nowhere", "out"], "has no JPEGImages"),
        (["shards", "folder", "nowhere", "out"], "no folder "),
        (["shards", "shapes", "SHARDS"], "holds a shard set already"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_status_two(
    words: list[str],
    said: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    assert cli.main([str(shards) if word == "SHARDS" else word for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert said in error
    assert "\n" not in error
