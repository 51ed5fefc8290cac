"""``afa bench``: every benchmark of the step runs, its files can be compared, wrong input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import afa

SMALL = ("--crop", 64, "--backbone", "mit_tiny", "--classes", 3, "--repetitions", 1)


@pytest.mark.parametrize("part", ["step", "par", "cam"])
def test_a_part_is_measured_against_its_plain_form_and_files_are_compared(part: str, tmp_path: Path) -> None:
    file = tmp_path / "results" / "one.json"
    printed = afa("bench", part, *SMALL, "--json", file)
    assert f"times as fast as {part}/64/plain" in printed
    result = json.loads(file.read_text())
    assert [item["name"] for item in result["measurements"]][:2] == [f"{part}/64/plain", f"{part}/64/here"]
    assert all(item["median_s"] > 0 for item in result["measurements"])
    assert result["machine"]["roofline"].keys() == {"bytes_per_s", "operations_per_s"}
    assert "1.00 times as fast" in afa("bench", "compare", file, file)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.json"
    no_result = tmp_path / "other.json"
    no_result.write_text("{}")
    for words, says in (
        (("step", "--crop", 32), "--crop 32: must be at least 64"),
        (("step", "--backbone", "mit_b9"), "mit_b9"),
        (("compare", nothing, nothing), "nothing.json"),
        (("compare", no_result, no_result), "is no result of afa bench"),
    ):
        line = afa("bench", *words, status=2).strip().splitlines()[-1]
        assert line.startswith("error:"), line
        assert says in line
