"""Shard sets: index, integrity, damage."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
from shard_sets import write_set

from afa_core.data.shards import (
    BadShard,
    dataset_digest,
    iterate_shard,
    load_dataset_index,
    save_dataset_index,
    verify_shards,
)
from afa_core.errors import InputError


def test_index_survives_the_round_trip_and_shards_fit_it(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    loaded = load_dataset_index(tmp_path)
    assert loaded == index
    assert loaded.splits["train"].samples == 20
    verify_shards(tmp_path, loaded, ["train"])
    assert dataset_digest(loaded) == dataset_digest(index)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("damage", ["missing", "longer", "flipped"])
def test_a_shard_that_does_not_fit_is_named(tmp_path: Path, damage: str) -> None:
    index = write_set(tmp_path)
    path = tmp_path / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flipped" else path.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"train-000002\.tar"):
        verify_shards(tmp_path, index, ["train"])


def test_lineage_is_kept_and_is_no_part_of_the_identity(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    plain = (tmp_path / "dataset.json").read_text()
    assert "lineage" not in plain
    assert load_dataset_index(tmp_path).lineage is None
    traced = dataclasses.replace(index, lineage={"run": "run-1", "outcome": {"accepted": 3}})
    save_dataset_index(tmp_path, traced)
    assert load_dataset_index(tmp_path) == traced
    assert dataset_digest(traced) == dataset_digest(index)
    (tmp_path / "dataset.json").write_text(plain[:-3] + ', "lineage": 3}\n')
    with pytest.raises(InputError, match="damaged"):
        load_dataset_index(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1, "classes": ["a"], "splits": {"train": {}}}'],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=r"dataset\.json"):
        load_dataset_index(tmp_path)


def test_an_index_may_not_name_files_outside_its_folder(tmp_path: Path) -> None:
    write_set(tmp_path)
    values = json.loads((tmp_path / "dataset.json").read_text())
    values["splits"]["train"]["shards"][0]["name"] = "../../etc/passwd"
    (tmp_path / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="outside its folder"):
        load_dataset_index(tmp_path)


def test_a_tar_cut_short_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    write_set(tmp_path, shards=1, samples=5)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: 1024 * 5 + 700])
    keys = []
    with pytest.raises(BadShard, match=r"train-000000\.tar"):
        keys.extend(raw["__key__"] for raw in iterate_shard(path))
    assert keys
    assert keys == [f"s0-{index}" for index in range(len(keys))]


def test_links_and_repeated_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in (("b.txt", b"1"), ("b.txt", b"2")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    samples = list(iterate_shard(path))
    assert [sample["__key__"] for sample in samples] == ["b"]
    assert samples[0]["txt"] == b"1"
