"""The checkpoint store: what is kept, what does not exist yet, what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ServiceError
from pipelines import patience
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


def test_a_marker_that_cannot_be_read_blocks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(str(tmp_path / "run"), keep_last=3)
    for step in (2, 4):
        save(store, tmp_path, step)
    (tmp_path / "run" / "step-00000004.json").write_text('{"step": 4')
    (tmp_path / "run" / "step-00000006.json").write_text('{"step": 6, "scores": {}, "files": {"weights": {}}}')
    newest = store.fetch_newest(tmp_path / "fetched")
    assert newest is not None
    assert newest.step == 2
    assert "step-00000004.json is no checkpoint's marker" in capsys.readouterr().err


def test_what_lacks_a_file_or_is_damaged_is_passed_over(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "run"), keep_last=3)
    for step in (2, 4, 6):
        save(store, tmp_path, step)
    (tmp_path / "run" / "step-00000006" / "weights").unlink()
    (tmp_path / "run" / "step-00000004" / "weights").write_bytes(b"other")
    assert [saved.step for saved in store.load_all()] == [2, 4]
    newest = store.fetch_newest(tmp_path / "fetched")
    assert newest is not None
    assert newest.step == 2


def test_a_state_is_safe_when_it_is_there_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_S", 0.05)
    (tmp_path / "run").write_text("a file where the folder should be")
    store = CheckpointStore(str(tmp_path / "run"))
    store.save(4, folder(tmp_path, 4), {})
    assert store.safe_step == 0
    (tmp_path / "run").unlink()
    store.wait()
    assert store.safe_step == 4


def test_a_store_that_refuses_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_S", 0.05)
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
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    monkeypatch.setattr(patience, "RETRY_S", 0.0)
    (tmp_path / "run").write_text("a file where the folder should be")
    store = CheckpointStore(str(tmp_path / "run"))
    store.save(1, folder(tmp_path, 1), {})
    with pytest.raises(ServiceError, match="cannot write"):
        store.save(2, folder(tmp_path, 2), {})
