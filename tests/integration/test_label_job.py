"""Labelling stores: pictures of every kind, shards, tables, S3; resumed, extended, tried again."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import webdataset as wds
from commands import afa, afa_command, afa_running, error_line
from labelling import done_units, masks_of, picture, rows_of, verified
from PIL import Image
from servers.fault_proxy import fault_proxy

from afa_core.checkpoint import load_bundle
from afa_core.data.sample import encode_mask
from afa_core.data.shapes import draw
from infra.object_store import write_object
from pipelines import label_windows, pseudo_label
from pipelines.cli import main
from pipelines.inventory import list_generations, load_units
from pipelines.label_job import StageSeconds
from pipelines.label_progress import expected_images
from pipelines.label_set import find_run
from pipelines.label_units import UnitWriter
from pipelines.labeller import Labeller


def label_arguments(words: list[object]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    pseudo_label.add_arguments(parser)
    return parser.parse_args(list(map(str, words[1:])))


pytestmark = pytest.mark.usefixtures("local_ray")


def test_labels_of_a_folder_with_bad_pictures(bundle: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    (pictures / "deep").mkdir(parents=True)
    for index in range(5):
        (pictures / "deep" / f"{index}.jpg").write_bytes(picture(index, kind="JPEG"))
    Image.fromarray(draw(9, 7, 64).image).resize((150, 31)).save(pictures / "wide.name.png")
    Image.new("RGB", (1, 1)).save(pictures / "dot.png")
    (pictures / "empty.jpg").touch()
    (pictures / "text.png").write_text("no picture")
    (pictures / "notes.txt").write_text("no picture either")
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 3]
    printed = afa(*words)
    assert "images 9  labels 7  quarantined 2" in printed
    assert "quarantined 2: undecodable_image" in printed
    assert "slowest stage:" in printed
    rows = rows_of(output)
    assert len(rows) == len({row["key"] for row in rows}) == 9
    assert {row["key"] for row in rows if row["status"] == "quarantined"} == {"empty", "text"}
    masks = masks_of(output)
    assert len(masks) == 7
    assert {mask.mode for mask in masks.values()} == {"P"}
    assert masks["wide_name"].size == (150, 31)
    assert masks["dot"].size == (1, 1)
    assert verified(output)
    # A unit without its marker does not exist; the same command does what is missing and nothing else.
    run = Path(find_run(str(output)))
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("labels/*.tar")}
    next(run.glob("labels/0000-000001-*.done.json")).unlink()
    assert "is not committed" in afa("verify-labels", output, status=1)
    assert "2 of 3 units are done already" in afa(*words)
    after = {path.name: path.stat().st_mtime_ns for path in run.glob("labels/*.tar")}
    assert after.keys() == before.keys()
    assert [name[:11] for name in after if after[name] != before[name]] == ["0000-000001"]
    # Another configuration is another run beside it; another input does not belong here.
    afa(*words, "--ignore-band")
    assert len(list(output.glob("run-*/run.json"))) == 2
    assert "holds labels of" in afa("label", "--model", bundle, "--input", tmp_path, "--output", output, status=2)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    for index in range(6):
        (pictures / f"{index}.png").write_bytes(picture(index))
    printed = afa("label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 4, "--dry-run")
    assert "plan: 6 inputs in 2 units, 2 units to do" in printed
    assert "for about 6 pictures" in printed
    assert not output.exists()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert main(["label", "--model", str(bundle), "--input", str(tmp_path / "empty.tar"), "--output", str(output),
                 "--dry-run"]) == 0  # fmt: skip
    assert "hold no pictures" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["--scales", "inf"], "--scales inf: input should be less than or equal to 4"),
    (["--scales", "1e6"], "--scales 1000000.0: input should be less than or equal to 4"),
    (["--scales", "wide"], "--scales: 'wide' is not a list of numbers, e.g. 1,0.5,1.5; afa label --help tells more"),
    (["--head", "cat"], "--head: invalid choice: 'cat' (choose from"),
    (["--refinement", "par"], "unrecognized arguments: --refinement par"),
    (["--workers"], "--workers: expected one argument"),
    ([], " has neither pictures nor .tar shards, only 0 other objects"),
    (["--input", "a" * 300], "no such input: "),
    (["--input", __file__], "cannot be taken as input: "),
    (["--output", __file__], f"--output {__file__} is a file: name a folder"),
], ids=str)  # fmt: skip
def test_wrong_options_are_one_line(
    bundle: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: int | str | None = main(["label", "--model", str(bundle), "--input", str(tmp_path), "--output",
                                         str(tmp_path / "out"), *words])  # fmt: skip
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_model_that_only_a_worker_can_refuse_is_one_line(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(picture(0))
    wrong = shutil.copytree(bundle, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "classes": [*config["classes"], "one more"]}))
    words = ["--input", tmp_path / "pictures", "--output", tmp_path / "labels"]
    printed = afa("label", "--model", wrong, *words, status=2)
    assert "do not fit" in error_line(printed)
    assert str(wrong) in error_line(printed)
    assert "Traceback" not in printed
    afa("label", "--model", bundle, *words)
    assert verified(tmp_path / "labels")


def live_metrics() -> str:
    """What Ray's agent tells Prometheus."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_progress_is_there_for_prometheus(bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "three.tar", "w") as tar:
        for index in range(3):
            data = picture(index)
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    words = ["label", "--model", bundle, "--input", tmp_path / "three.tar", "--output", tmp_path / "labels"]
    assert main(list(map(str, words))) == 0  # in this process, which lives on while Ray passes its numbers on
    deadline = time.monotonic() + 60
    counted = ("ray_afa_label_images_expected{", "ray_afa_label_images_done{")
    others = ("ray_afa_label_images_per_s{", "ray_afa_label_images_total{")
    while True:  # until the numbers of this job have come, not those of one before
        lines = [line for line in live_metrics().splitlines() if line.startswith((*counted, *others))]
        values = {line.rsplit(" ", 1)[1] for line in lines if line.startswith(counted)}
        if values == {"3.0"} and all(any(line.startswith(name) for line in lines) for name in (*counted, *others)):
            return
        assert time.monotonic() < deadline, lines
        time.sleep(0.5)


def test_the_expected_number_of_pictures_follows_the_shards() -> None:
    assert expected_images(10, 0, 0) == 10
    assert expected_images(10, 4, 4) == 10  # pictures
    assert expected_images(10, 4, 2000) == 5000  # shards of 500
    assert expected_images(10, 10, 4321) == 4321


def test_more_units_than_blocks(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    for index in range(10):
        (pictures / f"{index}.png").write_bytes(picture(index))
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 2, "--workers", 1]
    monkeypatch.setattr(label_windows, "MAX_BLOCKS", 2)
    assert main(list(map(str, words))) == 0
    assert verified(output)
    marker = Path(done_units(output)[1])
    job = pseudo_label.build_job(label_arguments(words), bundle, "model", str(output))
    units = list(load_units(find_run(str(output)), list_generations(find_run(str(output)))[0]))
    before = marker.stat().st_mtime_ns
    again = list(label_windows.run_units(units[:2], job, 1))  # a block that is tried again holds units that are done
    assert [result.counts.images for result in again] == [2, 2]
    assert marker.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def labels(local_ray: None, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label set of four pictures in two units, to be copied."""
    folder = tmp_path_factory.mktemp("verified")
    (folder / "pictures").mkdir()
    for index in range(4):
        (folder / "pictures" / f"{index}.png").write_bytes(picture(index))
    afa("label", "--model", bundle, "--input", folder / "pictures", "--output", folder / "labels", "--unit-size", 2)
    return folder / "labels"


def test_a_batch_is_told_of_when_it_is_written(labels: Path, bundle: Path) -> None:
    """What ``--dry-run`` reckons with: a GPU has not made the labels yet when it has been asked for them."""
    words = ["label", "--model", bundle, "--input", labels.parent / "pictures", "--output", labels]
    job = pseudo_label.build_job(label_arguments(words), bundle, "model", str(labels))
    unit = next(iter(load_units(find_run(str(labels)), list_generations(find_run(str(labels)))[0])))
    writer, told = UnitWriter(job.run, unit.name), 0
    for inputs in Labeller(job, load_bundle(bundle)).label_batches(unit, writer, StageSeconds()):
        told += inputs
        assert writer.counts.images == told
    assert told == 2


def rewrite_tar(tar: Path, marker: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Change members of a unit's tar, or leave them out, and have the marker name its new digest."""
    with tarfile.open(tar) as source:
        members = [(member.name, source.extractfile(member).read()) for member in source]  # type: ignore[union-attr]
    with tarfile.open(tar, "w") as writer:
        for name, data in members:
            changed = change(name, data)
            if changed is not None:
                member = tarfile.TarInfo(name)
                member.size = len(changed)
                writer.addfile(member, io.BytesIO(changed))
    values = json.loads(marker.read_text())
    marker.write_text(json.dumps(values | {"tar_sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}))


@pytest.mark.parametrize(("damage", "expected"), [
    ("mask", "is 0 times in"), ("size", "is 9 x 7, its picture 64 x 64"), ("values", "has values [77]"),
    ("tar", "differs from its SHA-256"), ("rows", "input 1 has no row"), ("cell", ".parquet differs from its SHA-256"),
    ("labels/stray.tar", "stray.tar belongs to no committed unit"), ("stray.txt", "stray.txt belongs to nothing"),
    ("drivers/old.txt", "old.txt is of no driver at work"), ("../stray.txt", "stray.txt is of no run"),
    ("../run-00000000/labels/x.tar", "run-00000000/labels/x.tar is of no run"), ("marker", "is not committed"),
])  # fmt: skip
def test_verification_finds_what_was_damaged(
    labels: Path, tmp_path: Path, damage: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "labels"
    shutil.copytree(labels, output)
    run = Path(find_run(str(output)))
    tar, rows = min(run.glob("labels/*.tar")), min(run.glob("labels/*.parquet"))
    marker = min(run.glob("labels/*.done.json"))
    if damage == "mask":
        rewrite_tar(tar, marker, lambda name, data: None if name == "1.png" else data)
    elif damage in ("size", "values"):
        mask = np.zeros((7, 9) if damage == "size" else (64, 64), np.uint8)
        mask[0, 0] = 77 if damage == "values" else 1
        rewrite_tar(tar, marker, lambda name, data: encode_mask(mask) if name == "1.png" else data)
    elif damage == "tar":
        tar.write_bytes(tar.read_bytes()[:-600])
    elif damage in ("rows", "cell"):
        table = pq.read_table(rows)
        pq.write_table(table.slice(0, 1) if damage == "rows" else table.drop_columns("confidence"), rows)
    elif damage == "marker":
        marker.unlink()
    else:
        (run / damage).resolve().parent.mkdir(parents=True, exist_ok=True)
        (run / damage).touch()
    assert main(["verify-labels", str(output)]) == 1
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_labelling_that_is_stopped_goes_on(bundle: Path, tmp_path: Path, sent: signal.Signals, status: int) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    for index in range(64):
        (pictures / f"{index}.png").write_bytes(picture(index, 96))
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 2]
    with afa_running(*words, until=lambda: len(done_units(output)) >= 2 if output.is_dir() else False) as process:
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    assert process.returncode == status
    if sent != signal.SIGKILL:
        assert "interrupted: the same command goes on" in error
        assert "Traceback" not in error
    assert 2 <= len(done_units(output)) < 32
    assert "images 64  labels 64  quarantined 0" in afa(*words)
    assert verified(output)


def test_two_drivers_on_one_output(bundle: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    for index in range(240):
        (pictures / f"{index}.png").write_bytes(picture(index, 128))
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 2]
    with afa_running(*words, until=lambda: bool(done_units(output)) if output.is_dir() else False) as process:
        assert "another driver is at work" in afa(*words, status=2)
        printed, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "images 240  labels 240" in printed
    assert verified(output)


def test_two_drivers_started_at_the_same_moment(bundle: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    for index in range(12):
        (pictures / f"{index}.png").write_bytes(picture(index))
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 2]
    drivers = [subprocess.Popen(afa_command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    said = [driver.communicate(timeout=250) for driver in drivers]
    statuses = [driver.returncode for driver in drivers]
    assert sorted(statuses) in ([0, 2], [0, 0]), said  # the later one gives way, or came when the other was done
    for status, (printed, error) in zip(statuses, said, strict=True):
        assert "images 12  labels 12" in printed if status == 0 else "another driver is at work" in error
    assert verified(output)


def test_labels_of_shards_take_their_tags(bundle: Path, tmp_path: Path) -> None:
    shards, output = tmp_path / "shards", tmp_path / "labels"
    shards.mkdir()
    for name in ("whole", "cut"):
        with wds.TarWriter(str(shards / f"{name}.tar"), encoder=False) as writer:
            for index in range(6):
                tags = json.dumps({"tags": ["disc", "unicorn"] if index % 2 else ["ring"]}).encode()
                writer.write({"__key__": f"{index:03d}", "png": picture(index), "json": tags})
            writer.write({"__key__": "../escape", "png": picture(7)})
            writer.write({"__key__": "000", "png": picture(7)})
    data = (shards / "cut.tar").read_bytes()
    (shards / "cut.tar").write_bytes(data[: len(data) // 2])
    printed = afa("label", "--model", bundle, "--input", shards, "--output", output)
    assert "quarantined 1: bad_shard" in printed
    rows = {row["key"]: row for row in rows_of(output)}
    assert Counter(row["reason"] for row in rows.values() if row["input"] == "whole") == {
        None: 6, "bad_key": 1, "duplicate_key": 1,
    }  # fmt: skip
    assert rows["whole~/001"]["tags"] == ["disc"]
    assert rows["whole~/001"]["unknown_tags"] == ["unicorn"]
    assert rows["whole~/001"]["tags_source"] == "given"
    assert rows["whole~/001"]["uri"] == f"{shards}/whole.tar#001"
    assert verified(output)


def test_a_table_of_uris_with_tags(bundle: Path, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
    table = tmp_path / "table.csv"
    lines = ["uri,tags", f"{tmp_path}/0.png,disc", "1.png,", "2.png,square;ring", "2.png,disc", "no.png,disc",
             "../x.png,disc", "http://a.b/c.png,disc"]  # fmt: skip
    table.write_text("\n".join(lines))
    afa("label", "--model", bundle, "--input", table, "--output", tmp_path / "labels")
    rows = {row["key"]: row for row in rows_of(tmp_path / "labels")}
    assert rows["0"]["tags"] == ["disc"]
    assert rows["1"]["tags"] == []
    assert Counter(row["reason"] for row in rows.values()) == {
        None: 3, "duplicate_key": 1, "missing_object": 1, "bad_path": 1, "bad_uri": 1,
    }  # fmt: skip
    assert verified(tmp_path / "labels")
    # Its store is asked for what it knows of each: other bytes and other tags are news, the rest is not.
    (tmp_path / "0.png").write_bytes(picture(7, 80))
    table.write_text(table.read_text().replace("1.png,", "1.png,ring"))
    words = ["label", "--model", bundle, "--input", table, "--output", tmp_path / "labels", "--incremental"]
    assert "2 new or changed" in afa(*words)
    rows = {row["key"]: row for row in rows_of(tmp_path / "labels")}
    assert (rows["0"]["width"], rows["1"]["tags"], len(rows)) == (80, ["ring"], 7)
    assert verified(tmp_path / "labels")


def test_a_bucket_with_a_bad_server_is_labelled_extended_and_tried_again(
    bundle: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3.client("s3").create_bucket(Bucket="store")
    source, output = "s3://store/pictures", "s3://store/labels/out"
    for index in range(40):
        write_object(f"{source}/{index % 3}/{index:03d}.png", picture(index))
    write_object(f"{source}/0/bad.png", b"no picture")
    words = ["label", "--model", bundle, "--input", source, "--output", output, "--unit-size", 5]
    with fault_proxy(s3, share=0.05) as proxy:
        proxy.forbidden.add("store/pictures/1/001.png")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        # Workers are to see the proxy: a Ray of their own.
        monkeypatch.delenv("RAY_ADDRESS")
        printed = afa(*words)
        assert "images 41  labels 39  quarantined 2" in printed
        assert "quarantined 1: forbidden" in printed
        assert verified(output)
        assert sum(proxy.counts[fault] for fault in ("500", "503", "slow", "cut")) > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    write_object(f"{source}/0/bad.png", picture(50))
    printed = afa(*words, "--only", "quarantined")
    assert "2 quarantined inputs are tried again" in printed
    assert "images 41  labels 41  quarantined 0" in printed
    write_object(f"{source}/new.png", picture(60))
    write_object(f"{source}/1/004.png", picture(61, 80))
    before = set(done_units(output))
    printed = afa(*words, "--incremental")
    assert "2 new or changed" in printed
    assert "images 42  labels 42  quarantined 0" in printed
    assert len(set(done_units(output)) - before) == 1
    assert masks_of(output)["1/004"].size == (80, 80)
    assert verified(output)
    assert "images 42  labels 42" in afa(*words)


def test_a_full_disk_stops_the_job_and_loses_nothing(bundle: Path, small_disk: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", small_disk / "labels"
    pictures.mkdir()
    for index in range(24):
        (pictures / f"{index}.png").write_bytes(picture(index, 128))
    ballast = small_disk / "ballast"
    ballast.write_bytes(os.urandom(2_000_000))
    words = ["label", "--model", bundle, "--input", pictures, "--output", output, "--unit-size", 4]
    printed = afa(*words, status=2)
    assert "No space left on device" in printed
    assert "Traceback" not in printed
    ballast.unlink()
    assert "images 24  labels 24" in afa(*words)
    assert verified(output)
    assert not np.any([path.name.endswith(".partial") for path in output.rglob(".*")])
