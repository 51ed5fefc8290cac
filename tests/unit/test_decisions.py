"""Tables of decisions: what is understood, and what is refused in one line that names the row."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afa_core.data.sample import BadSample, check_key, decode_seg_label
from afa_core.errors import InputError
from pipelines.decisions import Decision, Decisions, corrected_mask, named_run
from pipelines.errors import UsageError
from pipelines.scratch_table import ScratchTable

IDENTITY = {"run": "run-1", "model_digest": "abc", "config_digest": "def"}


def decisions_of(path: Path, *keys: str) -> dict[str, Decision]:
    with ScratchTable(path.parent, f"t{len(list(path.parent.iterdir()))}") as table:
        decisions = Decisions(path, table)
        decisions.load(IDENTITY)
        return decisions.of(list(keys))


def test_the_columns_that_are_needed_and_those_that_may_be(tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    path.write_bytes("\ufeffkey,decision,note,mask,run\r\n./0007,Accept,,,run-1\r\n=1+1,fix,edge,m/1.png,\r\n".encode())
    assert decisions_of(path, "0007", "=1+1", "other") == {
        "0007": Decision("accept", 2),
        "=1+1": Decision("fix", 3, "edge", f"{tmp_path}/m/1.png"),
    }
    assert named_run(path) == "run-1"
    path = tmp_path / "few.jsonl"
    path.write_text('{"key": "a", "decision": "reject"}\n{"key": "a", "decision": "reject"}\n')
    assert decisions_of(path, "a") == {"a": Decision("reject", 2)}
    assert named_run(path) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,decision\na,accept\n", "no column 'key'"),
        ("key;decision\na;accept\n", "no column 'key'"),
        ("key,choice\na,accept\n", "no column 'decision'"),
        ("key,decision\na,maybe\n", "row 2: unknown decision 'maybe'"),
        ("key,decision\na,accept\nb,accept\na,reject\n", "row 4: 'a' is reject here and accept in row 2"),
        ("key,decision,run\na,accept,run-2\n", "row 2: run is run-2, that of the labels is run-1"),
        ("key,decision,config_digest\na,accept,zzz\n", "row 2: config_digest is zzz"),
        ("key,decision,mask\na,accept,a.png\n", "row 2: a mask belongs to a fix"),
        ("key,decision\na,accept,too many\n", "Expected 2 columns, got 3"),
        ("key,decision\n" + "a,x\n" * 20, "and 15 more"),
        ("", "cannot be read"),
    ],
)
def test_wrong_tables_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "review.csv"
    path.write_text(text)
    with pytest.raises((InputError, UsageError)) as caught:
        decisions_of(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def is_key(text: str) -> bool:
    try:
        return bool(check_key(text))
    except BadSample:
        return False


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(is_key), unique=True, min_size=1))
def test_every_key_survives_the_table(tmp_path_factory: pytest.TempPathFactory, keys: list[str]) -> None:
    path = tmp_path_factory.mktemp("keys") / "review.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
        writer.writerow(["key", "decision"])
        writer.writerows([f"./{key}", "accept"] for key in keys)
    assert decisions_of(path, *keys).keys() == set(keys)


def test_a_corrected_mask_is_checked(tmp_path: Path) -> None:
    label = np.zeros((4, 6), np.uint8)
    label[1], label[2] = 2, 255
    path = str(tmp_path / "mask.png")
    Image.fromarray(label).save(path)
    written = corrected_mask(path, (4, 6), ("a", "b"), 1.0)
    assert np.array_equal(decode_seg_label(written), label)
    for size, classes, reason in [((6, 4), ("a", "b"), "size_mismatch"), ((4, 6), ("a",), "bad_seg")]:
        with pytest.raises(BadSample, match=reason):
            corrected_mask(path, size, classes, 1.0)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    with pytest.raises(BadSample, match="bad_seg"):
        corrected_mask(path, (4, 6), ("a",), 1.0)
    with pytest.raises(BadSample, match="missing_object"):
        corrected_mask(f"{path}.gone", (4, 6), ("a",), 1.0)
