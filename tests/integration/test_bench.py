"""``afa bench``: every benchmark of the step runs, its files can be compared, wrong input is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import afa

from afa_core.errors import InputError
from pipelines.benchmarks.loader import load_pictures
from pipelines.benchmarks.measure import in_own_process
from pipelines.cli import main
from pipelines.errors import UsageError

SMALL = ("--crop", 64, "--backbone", "mit_tiny", "--classes", 3, "--repetitions", 1)


@pytest.mark.parametrize("part", ["step", "cam"])
def test_a_part_is_measured_against_its_plain_form_and_files_are_compared(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results" / "one.json"
    assert f"times as fast as {part}/64/plain" in afa("bench", part, *SMALL, "--json", file)
    result = json.loads(file.read_text())
    assert [item["name"] for item in result["measurements"]][:2] == [f"{part}/64/plain", f"{part}/64/here"]
    assert all(item["median_s"] > 0 for item in result["measurements"])
    assert result["machine"]["roofline"].keys() == {"bytes_per_s", "operations_per_s"}
    assert main(["bench", "compare", str(file), str(file)]) == 0
    assert "1.00 times as fast" in capsys.readouterr().out


def test_a_step_is_measured_under_autocast() -> None:
    assert "times as fast as step/64/plain" in afa("bench", "step", *SMALL, "--bfloat16")


def test_loading_is_measured_against_the_bare_decoder(tmp_path: Path) -> None:
    file = tmp_path / "loader.json"
    afa("bench", "loader", "--limit", 16, "--crop-px", 64, "--repetitions", 1, "--json", file)
    measured = {item["name"]: item for item in json.loads(file.read_text())["measurements"]}
    assert {"bare decoder", "shards, in process", "shards, 2 loading", "crops alone, rescaled"} <= measured.keys()
    assert all(item["images"] == 16 and item["median_s"] > 0 for item in measured.values())


def test_a_wrong_model_is_one_line() -> None:
    (line,) = (line for line in afa("bench", "par", "--backbone", "mit_b9", status=2).splitlines() if "error" in line)
    assert line.startswith("error:")
    assert "mit_b9" in line


@pytest.mark.parametrize(("words", "says"), [
    (("step", "--crop", "32"), "--crop 32: must be at least 64"),
    (("loader", "--limit", "0"), "--limit 0: must be at least 1"),
    (("label", "--workers", "0"), "--workers 0: must be at least 1"),
    (("par", "--json", "/dev/null/x.json"), "--json /dev/null/x.json: File exists"),
    (("step", "--gradient-checkpointing", "--backbone", "timm:x"), "--gradient-checkpointing: timm:x has none"),
    (("step", "--published", "nowhere"), "--published nowhere: must be a clone of"),
    (("compare", "nothing.json", "nothing.json"), "nothing.json: No such file"),
    (("compare", __file__, __file__), "is no result of afa bench"),
], ids=["crop", "limit", "workers", "json", "checkpointing", "published", "missing", "other"])  # fmt: skip
def test_wrong_input_is_one_line(words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(("function", "argument", "says"), [
    (os._exit, 9, "the measured process was killed"),
    (np.ones, 2**50, "there is not the memory"),
    (torch.ones, 2**50, "there is not the memory"),
], ids=["killed", "numpy", "torch"])  # fmt: skip
def test_a_case_that_memory_is_not_enough_for_is_one_line(
    function: Callable[..., Any], argument: int, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        in_own_process(function, argument)


@pytest.mark.parametrize("damage", [
    {"settings": None}, {"machine": "fast"}, {"measurements": [{}]}, {"schema_version": 2},
    {"measurements": [{"name": "a", "median_s": 0, "peak_mib": None}]},
], ids=str)  # fmt: skip
def test_a_damaged_result_is_one_line(
    damage: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole: dict[str, object] = {"schema_version": 1, "settings": {}, "machine": {}}
    whole["measurements"] = [{"name": "a", "median_s": 1.0, "peak_mib": None}]
    for name, record in (("whole", whole), ("damaged", whole | damage)):
        (tmp_path / name).write_text(json.dumps(record))
    assert main(["bench", "compare", str(tmp_path / "whole"), str(tmp_path / "damaged")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'damaged'} is no result of afa bench" in line


@pytest.mark.parametrize(("name", "content", "says"), [
    ("broken.jpg", b"no picture", "broken.jpg cannot be measured with: undecodable_image"),
    ("text.txt", b"", "has no JPEG"),
])  # fmt: skip
def test_pictures_that_cannot_be_measured_with_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        load_pictures(tmp_path, 8)
