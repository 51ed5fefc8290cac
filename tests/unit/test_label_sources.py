"""What stands in a store, whatever its name and however it can be read: listed, or listed with a reason why not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from infra.errors import ServiceError
from infra.object_store import ObjectError, fetch_file, find_object, read_object
from pipelines.label_sources import Listed, list_source

NOBODY = 65534


def listed(source: Path) -> dict[str, Listed]:
    return {row.uri.removeprefix(f"{source}/"): row for row in list_source(str(source)) if row is not None}


def test_names_and_links_of_every_kind(tmp_path: Path) -> None:
    store, elsewhere = tmp_path / "store", tmp_path / "elsewhere"
    for folder in (store / "deep", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.png").touch()
    os.close(os.open(os.fsencode(store) + b"/b\xff.png", os.O_CREAT))
    (store / "self.png").symlink_to("self.png")
    (store / "nowhere.png").symlink_to("gone.png")
    (store / "linked").symlink_to(elsewhere)
    (store / "deep" / "up").symlink_to(store)
    (elsewhere / "back").symlink_to(elsewhere)
    (store / "tilde~1.png").touch()
    os.mkfifo(store / "pipe.png")
    problems = {name: row.problem for name, row in listed(store).items()}
    assert problems == {
        "deep/a.png": "", "linked/a.png": "", "nowhere.png": "", "tilde~1.png": "",
        "self.png": "unreadable", "b\\udcff.png": "bad_path",
    }  # fmt: skip
    assert listed(store)["tilde~1.png"].key == "tilde_1"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_read_is_one_row_with_its_reason() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        store.chmod(0o755)
        (store / "closed").mkdir(mode=0o700)
        (store / "closed" / "a.png").touch()
        (store / "open.png").touch()
        (store / "secret.png").touch(mode=0o600)
        os.seteuid(NOBODY)
        try:
            assert {name: row.problem for name, row in listed(store).items()} == {
                "closed": "forbidden", "open.png": "", "secret.png": "",
            }  # fmt: skip
            with pytest.raises(ObjectError, match="forbidden"):
                read_object(str(store / "secret.png"))
            with pytest.raises(ServiceError, match="Permission denied"):
                find_object(str(store / "closed" / "a.png"))
            with pytest.raises(ServiceError, match="Permission denied"):
                list(list_source(str(store / "closed")))
        finally:
            os.seteuid(0)


def test_rows_of_a_table_have_what_the_store_knows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    long_name = "a" * 300
    table = tmp_path / "table.jsonl"
    names = ["a.png", "gone.png", f"{long_name}.png", f"{long_name}.tar", "", "\\ud800.png", "a.png/b.png"]
    table.write_text("".join(f'{{"uri": "{name}", "tags": ["\\udfff"]}}\n' for name in names))
    rows = list(list_source(str(table)))
    assert [(row.size, bool(row.etag), row.problem) for row in rows if row] == [
        (5, True, ""), (-1, False, ""), (-1, False, ""), (-1, False, ""), (-1, False, "bad_path"),
        (-1, False, "bad_path"), (-1, False, ""),
    ]  # fmt: skip
    assert {row.tags for row in rows if row} == {("\\udfff",)}


def test_what_cannot_be_read_says_why_and_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "large").write_bytes(bytes(1000))
    reasons = {"pipe": "unreadable", "self": "unreadable", "a" * 300: "unreadable", ".": "unreadable",
               "large/x": "missing_object", "none": "missing_object"}  # fmt: skip
    for name, reason in reasons.items():
        for read in (lambda uri: fetch_file(uri, tmp_path), read_object):
            with pytest.raises(ObjectError) as caught:
                read(f"{tmp_path}/{name}")
            assert caught.value.reason == reason, name
    with pytest.raises(ObjectError, match=r"too_large: .*1000 bytes, allowed 999"):
        read_object(f"{tmp_path}/large", 999)
    assert len(read_object(f"{tmp_path}/large", 1000)[0]) == 1000
