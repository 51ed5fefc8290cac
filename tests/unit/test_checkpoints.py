"""The checkpoint store: what is kept, what does not exist yet, what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ServiceError
from pipelines import checkpoints
from pipelines.checkpoints import CheckpointStore


def folder(tmp_path: Path, step: int) -> Path:
    path = tmp_path / f"made-{step}"
    path.mkdir()
    (path / "weights").write_bytes(bytes([step]) * 1000)
    return path


def save(store: CheckpointStore, tmp_path: Path, step: int, **scores: float) -> None:
    store.save(step, folder(tmp_path, step), scores)
    store.wait()


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "run"), keep_last=2, keep_best=1, metric="miou")
    for step, miou in ((1, 0.3), (2, 0.9), (3, 0.4), (4, float("nan")), (5, 0.5)):
        save(store, tmp_path, step, miou=miou)
    save(store, tmp_path, 6)
    assert [saved.step for saved in store.load_all()] == [2, 5, 6]
    best = store.best()
    assert best is not None
    assert best.step == 2
    assert (best.fetch(tmp_path / "fetched") / "weights").read_bytes() == bytes([2]) * 1000
    assert not list(tmp_path.glob("made-*"))
    assert len(list((tmp_path / "run").iterdir())) == 6  # three folders, three markers


def test_without_a_marker_there_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "run"))
    assert store.load_all() == []
    assert store.best() is None
    orphan = tmp_path / "run" / "step-00000007"
    orphan.mkdir(parents=True)
    (orphan / "weights").write_bytes(b"half")
    assert store.load_all() == []
    save(store, tmp_path, 8)
    assert not (orphan / "weights").exists()


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "run"))
    save(store, tmp_path, 1)
    (tmp_path / "run" / "step-00000001" / "weights").write_bytes(b"other")
    with pytest.raises(ServiceError, match="weights is not what was saved"):
        store.load_all()[0].fetch(tmp_path / "fetched")


def test_a_store_that_refuses_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.05)
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    store = CheckpointStore(str(blocked))
    store.save(1, folder(tmp_path, 1), {})
    assert store._upload is not None
    assert not store._upload.done()
    blocked.unlink()
    store.wait()
    assert [saved.step for saved in store.load_all()] == [1]


def test_a_store_that_refuses_for_good_fails_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PATIENCE_S", 0.0)
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.0)
    (tmp_path / "run").write_text("a file where the folder should be")
    store = CheckpointStore(str(tmp_path / "run"))
    store.save(1, folder(tmp_path, 1), {})
    with pytest.raises(ServiceError, match="cannot write"):
        store.save(2, folder(tmp_path, 2), {})
