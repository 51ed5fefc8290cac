"""Labelling while its processes are killed: a worker, the raylet. Each on a Ray of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import afa, afa_running
from labelling import done_units, picture, verified
from processes import descendants, first_named


@pytest.fixture
def words(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "pictures").mkdir()
    for index in range(200):
        (tmp_path / "pictures" / f"{index:03d}.png").write_bytes(picture(index, 128))
    return ["label", "--model", bundle, "--input", tmp_path / "pictures", "--output", tmp_path / "labels",
            "--unit-size", 4, "--workers", 2]  # fmt: skip


def begun(output: Path) -> bool:
    return output.is_dir() and len(done_units(output)) >= 2


def test_a_killed_worker_costs_its_unit_and_no_more(words: list[object], tmp_path: Path) -> None:
    output = tmp_path / "labels"
    with afa_running(*words, until=lambda: begun(output)) as process:
        worker = first_named(process.pid, "ray::MapWorker")
        assert worker is not None, descendants(process.pid)
        os.kill(worker, signal.SIGKILL)
        before = {path: Path(path).stat().st_mtime_ns for path in done_units(output)}
        printed, error = process.communicate(timeout=250)
    assert process.returncode == 0, error[-3000:]
    assert "images 200  labels 200  quarantined 0" in printed
    assert all(Path(path).stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert verified(output)


def test_after_the_raylet_is_killed_the_command_ends_and_can_be_run_again(words: list[object], tmp_path: Path) -> None:
    output = tmp_path / "labels"
    with afa_running(*words, until=lambda: begun(output)) as process:
        raylet = first_named(process.pid, "/raylet/raylet")
        assert raylet is not None, descendants(process.pid)
        os.kill(raylet, signal.SIGKILL)
        started = time.monotonic()
        _, error = process.communicate(timeout=200)
        print(f"ended with {process.returncode} after {time.monotonic() - started:.0f} s: {error[-2000:]}")
    assert process.returncode not in (0, 2)
    before = {path: Path(path).stat().st_mtime_ns for path in done_units(output)}
    assert "images 200  labels 200  quarantined 0" in afa(*words)
    assert all(Path(path).stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert verified(output)
