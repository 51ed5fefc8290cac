"""``afa report`` on label sets of a model, of a generator, on S3; its bounds and its mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
from commands import afa, error_line
from generated_labels import write_run
from labelling import picture

from infra.object_store import read_object, write_object
from pipelines.cli import main

ROOT = Path(__file__).parents[2]


def data_of(page: bytes | str) -> dict[str, Any]:
    text = page.decode() if isinstance(page, bytes) else page
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    values: dict[str, Any] = json.loads(data)
    return values


@pytest.mark.usefixtures("local_ray")
def test_two_runs_of_a_model_and_pictures_that_are_gone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(*words: object) -> str:
        assert main([str(word) for word in ("report", labels, "--output", page, *words)]) == 0
        return capsys.readouterr().out

    pictures, labels, page = tmp_path / "pictures", tmp_path / "labels", tmp_path / "page" / "report.html"
    pictures.mkdir()
    for index in range(9):
        (pictures / f"{index}.png").write_bytes(picture(index))
    (pictures / "bad.png").write_bytes(b"no picture")
    words = ["label", "--model", bundle, "--input", pictures, "--output", labels, "--tag-probability", 0.01]
    afa(*words, "--unit-size", 4)
    (first,) = [path.name for path in labels.iterdir()]
    printed = report()
    assert "images 10  labels 9  quarantined 1" in printed
    assert f"run {first}, compared with nothing" in printed
    afa(*words, "--unit-size", 4, "--refine", "none")
    (pictures / "3.png").unlink()
    (pictures / "4.png").write_bytes(picture(40))
    printed = report()
    assert f"compared with {first}" in printed
    cards = {card["key"]: card for card in data_of(page.read_text())["cards"]}
    assert cards.keys() == {str(index) for index in range(9)}
    problems = {key: card["problem"] for key, card in cards.items() if card["problem"]}
    assert problems == {"3": "missing_object", "4": "changed_since_listing"}
    assert all(card["mask"] and card["distance"] is not None for card in cards.values())
    assert all(bool(card["picture"]) == (key not in problems) for key, card in cards.items())
    assert f"run {first}, compared with nothing" in report("--run", first)


def test_a_label_set_and_a_page_on_s3(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boto3.client("s3").create_bucket(Bucket="reports")
    run = write_run(tmp_path / "labels", "run-00000001", 130)
    for path in run.rglob("*.*"):
        write_object(f"s3://reports/labels/{path.relative_to(run.parent)}", path.read_bytes())
    assert main(["report", "s3://reports/labels", "--output", "s3://reports/page.html", "--gallery", "20"]) == 0
    assert "20 of 127 labels in its gallery" in capsys.readouterr().out
    data = data_of(read_object("s3://reports/page.html")[0])
    assert len(data["cards"]) == 20
    assert all(card["picture"] and card["mask"] for card in data["cards"])


def test_an_unfinished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "labels", "run-00000001", 200)
    for path in sorted((run / "labels").glob("*.done.json"))[1:]:
        path.unlink()
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    assert "images 64" in capsys.readouterr().out
    assert "Unfinished: 3 of 4 units have no labels yet." in page.read_text()


def test_a_pause_is_cut_out_of_the_time(tmp_path: Path) -> None:
    write_run(tmp_path / "labels", "run-00000001", 50 * 8, unit_rows=8)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "labels"), "--output", str(page)]) == 0
    assert "stood still for 2 h 00 min" in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "run-9"], "holds no run-9"),
        (["--against", "run-9"], "has no such run"),
        (["--against", "run-00000001"], "is the run that is reported"),
        (["--gallery", "-1"], "must lie between 0 and"),
        (["--gallery", "100000"], "must lie between 0 and"),
        (["--output", "."], "is a folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "labels", "run-00000001", 10)
    status = main(["report", str(tmp_path / "labels"), "--output", str(tmp_path / "report.html"), *words])
    captured = capsys.readouterr()
    assert status == 2
    assert said in error_line(captured.err)


def test_ten_times_the_rows_take_no_more_memory() -> None:
    peaks = {}
    for rows in (3_000, 30_000):
        command = [sys.executable, "tests/benchmarks/report.py", str(rows)]
        environment = {"PYTHONPATH": "tests:.", "PATH": "/usr/bin:/bin"}
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        facts = json.loads(answer.stdout)
        assert facts["status"] == 0
        assert facts["page_mb"] < 20
        peaks[rows] = facts["peak_mib"]
    assert peaks[30_000] < peaks[3_000] + 40
