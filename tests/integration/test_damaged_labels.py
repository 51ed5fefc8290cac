"""A label set that lost a file or half of one: whoever reads it says which in one line."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from commands import error_line
from generated_labels import write_run

from pipelines.cli import main

# Each is one file of the run below, and what is left of its bytes; None: the file is gone.
DAMAGES = {
    "run.json": 5,
    "inventory/0000/inventory.json": 5,
    "inventory/0000/units.parquet": 300,
    "labels/*.done.json": 5,
    "labels/*.parquet": 300,
    "labels/*.tar": 5000,
    "labels/*-a.tar": None,
}
READERS = {
    "export": ("--format", "coco", "--output"),
    "report": ("--output",),
    "review": ("--undecided", "accept", "--output"),
}


def words(command: str, labels: object, whole: Path, output: object) -> list[str]:
    """A command that reads labels; the table of decisions lies beside those that are whole."""
    action = ["apply", str(labels), "--decisions", f"{whole.parent}/decisions.csv"]
    return [command, *(action if command == "review" else [str(labels)]), *READERS[command], str(output)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("labels") / "set"
    write_run(folder, "run-1", 16)
    (folder.parent / "decisions.csv").write_text("key,decision\n")
    return folder


@pytest.fixture
def labels(whole: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "set"))


@pytest.mark.parametrize("command", READERS)
def test_a_mask_that_is_gone_is_its_tars_damage(
    command: str, whole: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [tar] = (labels / "run-1" / "labels").glob("*.tar")
    with tarfile.open(tar) as old:
        left = [(member, old.extractfile(member)) for member in old.getmembers()[1:]]
        with tarfile.open(tmp_path / "new.tar", "w") as new:
            for member, data in left:
                new.addfile(member, data)
    (tmp_path / "new.tar").replace(tar)
    assert main(words(command, labels, whole, tmp_path / "made")) == 2
    assert f"{tar} cannot be read" in error_line(capsys.readouterr().err)


@pytest.fixture(params=DAMAGES.items(), ids=lambda damage: damage[0].replace("/", " "))
def damaged(labels: Path, request: pytest.FixtureRequest) -> Path:
    """A copy with one damage."""
    pattern, bytes_left = request.param
    [path] = (labels / "run-1").glob(pattern)
    if bytes_left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:bytes_left])
    return labels


@pytest.mark.parametrize("command", READERS)
def test_readers_name_the_damaged_file_in_one_line(
    command: str, damaged: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(command, damaged, whole, tmp_path / "made")) == 2
    line = error_line(capsys.readouterr().err)
    assert f"{damaged}/run-1/" in line
    assert "cannot be read" in line
    assert not (tmp_path / "made").is_file()


def test_a_whole_set_has_no_problem(whole: Path) -> None:
    assert main(["verify-labels", str(whole)]) == 0


def test_one_damage_is_one_problem_that_names_the_file(
    damaged: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern: str = request.node.callspec.params["damaged"][0]
    assert main(["verify-labels", str(damaged)]) == 1
    [problem] = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert pattern.rsplit("/", 1)[-1].lstrip("*") in problem


def test_a_marker_that_the_store_refuses_is_one_problem(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [marker] = labels.glob("run-1/labels/*.done.json")
    marker.unlink()
    marker.mkdir()
    assert main(["verify-labels", str(labels)]) == 1
    [problem] = [line for line in capsys.readouterr().out.splitlines() if "PROBLEM" in line]
    assert marker.name in problem


@pytest.mark.parametrize("command", READERS)
def test_nothing_is_written_into_a_label_set(
    command: str, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(whole.parent)
    before = sorted(whole.rglob("*"))
    for output in ("set/made", "set", "other/../set/run-1/made"):
        assert main(words(command, "set", whole, output)) == 2
        assert f"--output {output} lies in the label set" in capsys.readouterr().err
    assert sorted(whole.rglob("*")) == before


@pytest.mark.parametrize("command", ["report", "review"])
def test_a_mask_that_is_none_is_named(
    command: str, whole: Path, labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [tar] = (labels / "run-1" / "labels").glob("*.tar")
    tar.write_bytes(tar.read_bytes().replace(b"\x89PNG", b"\0\0\0\0"))
    assert main(words(command, labels, whole, tmp_path / "made")) == 2
    assert "damaged" in capsys.readouterr().err
    assert main(words("export", labels, whole, tmp_path / "coco")) == 2
    assert main(["verify-labels", str(labels)]) == 1
