"""Two groups of workers on one run: only the newest one commits and deletes, whatever the other one believes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import driver_lease, fence
from pipelines.checkpoints import CheckpointStore
from pipelines.driver_lease import DriverLease
from pipelines.fence import Fence, Fenced


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[DriverLease]:
    with DriverLease(str(tmp_path / "run")) as held:
        yield held


def taken(lease: DriverLease) -> Fence:
    made = Fence(lease.run_uri, lease.name)
    made.take()
    return made


def store(of: Fence) -> CheckpointStore:
    return CheckpointStore(f"{of.run_uri}/checkpoints", of, keep_last=1)


def save(store: CheckpointStore, tmp_path: Path, step: int, content: bytes = b"weights") -> None:
    folder = tmp_path / f"made-{step}-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "weights").write_bytes(content)
    store.save(step, folder, {})
    store.wait()


def test_a_group_whose_run_was_taken_commits_and_deletes_nothing(lease: DriverLease, tmp_path: Path) -> None:
    old, new = store(taken(lease)), None
    save(old, tmp_path, 4)
    new = store(taken(lease))
    save(new, tmp_path, 6, b"of the new group")
    for _ in range(2):
        with pytest.raises(Fenced, match="another group of workers has taken"):
            save(old, tmp_path, 8)
    assert [saved.step for saved in new.load_all()] == [6]
    save(new, tmp_path, 8, b"of the new group, too")
    (newest,) = new.load_all()
    assert (newest.fetch(tmp_path / "fetched") / "weights").read_bytes() == b"of the new group, too"


def test_a_slow_group_does_not_delete_what_a_later_one_is_uploading(lease: DriverLease, tmp_path: Path) -> None:
    """The later one begins right after the slow one was told that the run is its own."""

    class SlowFence(Fence):
        looks = 0

        def check(self) -> None:
            super().check()
            self.looks += 1
            if self.looks == 2:  # the first look is before the marker, the second before anything is deleted
                upload.mkdir(parents=True)
                (upload / "weights").write_bytes(b"on its way")

    upload = tmp_path / "run" / "checkpoints" / "step-00000004-later"
    slow = SlowFence(lease.run_uri, lease.name)
    slow.take()
    save(store(slow), tmp_path, 4)
    assert slow.looks == 2
    assert (upload / "weights").read_bytes() == b"on its way"


def test_without_its_drivers_claim_a_group_neither_starts_nor_commits(lease: DriverLease, tmp_path: Path) -> None:
    group = store(taken(lease))
    (tmp_path / "run" / "drivers" / f"{lease.name}.json").unlink()  # what the next driver does
    with pytest.raises(Fenced, match="does not hold"):
        save(group, tmp_path, 4)
    with pytest.raises(Fenced, match="does not hold"):
        taken(lease)
    assert group.load_all() == []


def test_a_silent_driver_is_noticed_without_a_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(fence, "DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(driver_lease, "HEARTBEAT_S", 0.05)
    with DriverLease(str(tmp_path / "run")) as lease:
        group = taken(lease)
        time.sleep(1.5)
        assert group.lost == ""
        lease._ended.set()  # no more beats, as if the driver were gone
        lease._thread.join()
        deadline = time.monotonic() + 20
        while not group.lost:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(Fenced, match="silent for more than"):
            group.check()


def test_a_group_that_ended_watches_no_longer(lease: DriverLease, tmp_path: Path) -> None:
    group = taken(lease)
    group.release()
    (tmp_path / "run" / "drivers" / f"{lease.name}.json").unlink()
    assert group.lost == ""
