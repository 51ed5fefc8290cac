"""Labelling while its processes are killed: a worker, the raylet, the driver. Each on a Ray of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import boto3
import pytest
from commands import afa, afa_running, outcome
from labelling import done_units, picture, rows_of, verified
from processes import descendants, first_named
from servers.fault_proxy import fault_proxy
from waiting import wait_until

from infra.object_store import delete_object, find_object, write_object


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


def test_after_the_raylet_is_killed_the_command_ends_and_can_be_run_again(
    bundle: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    boto3.client("s3").create_bucket(Bucket="raylet")
    source, output = "s3://raylet/pictures", "s3://raylet/labels"
    for index in range(100):
        write_object(f"{source}/{index:03d}.png", picture(index, 128))
    words = ["label", "--model", bundle, "--input", source, "--output", output, "--unit-size", 4, "--workers", 2]
    with afa_running(*words, until=lambda: len(done_units(output)) >= 2) as process:
        raylet = first_named(process.pid, "/raylet/raylet")
        assert raylet is not None, descendants(process.pid)
        os.kill(raylet, signal.SIGKILL)
        started = time.monotonic()
        _, error = process.communicate(timeout=200)
        print(f"ended with {process.returncode} after {time.monotonic() - started:.0f} s: {error[-2000:]}")
    assert process.returncode == 1
    assert "the same command goes on with what is missing" in error
    before = {uri: find_object(uri) for uri in done_units(output)}
    assert 2 <= len(before) < 25
    assert "images 100  labels 100  quarantined 0" in afa(*words)
    assert {uri: find_object(uri) for uri in before} == before
    assert verified(output)


def test_kills_of_worker_and_driver_under_a_bad_server(bundle: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3.client("s3").create_bucket(Bucket="killed")
    source, output = "s3://killed/pictures", "s3://killed/labels"
    for index in range(48):
        write_object(f"{source}/{index:03d}.png", picture(index, 96))
    words = ["label", "--model", bundle, "--input", source, "--output", output, "--unit-size", 2, "--workers", 2]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with fault_proxy(s3, share=0.05) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with afa_running(*words, until=lambda: bool(done_units(output))) as process:
            delete_object(f"{source}/047.png")  # listed, and not read yet
            worker = first_named(process.pid, "ray::MapWorker")
            assert worker is not None, descendants(process.pid)
            os.kill(worker, signal.SIGKILL)
            begun_units = len(done_units(output))
            wait_until(lambda: len(done_units(output)) >= begun_units + 2, process, lambda: outcome(process), 60)
            process.kill()
            _, error = process.communicate()
        assert "the same command goes on with what is missing" in error
        before = {uri: find_object(uri) for uri in done_units(output)}
        assert len(before) < 24
        assert "images 48  labels 47  quarantined 1" in afa(*words)
        assert {uri: find_object(uri) for uri in before} == before
        assert verified(output)
    assert [row["reason"] for row in rows_of(output) if row["key"] == "047"] == ["missing_object"]
    assert sum(proxy.counts[fault] for fault in ("500", "503", "slow", "cut")) > 0
