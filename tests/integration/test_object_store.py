"""The object store against a real S3 server, with and without faults, and against a folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from servers.fault_proxy import fault_proxy
from shard_sets import write_set

from infra import object_store
from infra.errors import ServiceError
from infra.object_store import ObjectError, delete_object, find_object, list_objects, read_object, write_object
from pipelines.shard_store import split_files

Connect = Callable[[str], None]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Go to another endpoint from here on, to the end of the test."""

    def to(endpoint: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        object_store._client.cache_clear()

    yield to
    object_store._client.cache_clear()


@pytest.fixture
def bucket(s3: str, connect: Connect) -> str:
    connect(s3)
    name = f"b-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else str(request.getfixturevalue("bucket"))


def test_written_objects_are_listed_read_found_and_deleted(store: str) -> None:
    contents = {f"a/{index:02d}/x.bin": os.urandom(index * 1000) for index in range(12)} | {
        "top": b"1",
        "a.b/c d/ü": b"2",
    }
    for name, data in contents.items():
        write_object(f"{store}/{name}", b"to be replaced")
        write_object(f"{store}/{name}", data)
    listed = {item.uri.removeprefix(f"{store}/"): item for item in list_objects(store)}
    assert listed.keys() == contents.keys()
    for name, data in contents.items():
        uri = f"{store}/{name}"
        assert listed[name].size == len(data)
        assert read_object(uri) == (data, listed[name].etag)
        found = find_object(uri)
        assert found is not None
        assert (found.size, found.etag) == (len(data), listed[name].etag)
    before = listed["top"].etag
    write_object(f"{store}/top", b"other")
    changed = find_object(f"{store}/top")
    assert changed is not None
    assert changed.etag != before
    delete_object(f"{store}/top")
    delete_object(f"{store}/top")
    assert find_object(f"{store}/top") is None
    with pytest.raises(ObjectError) as caught:
        read_object(f"{store}/top")
    assert caught.value.reason == "missing_object"


def test_a_prefix_is_a_folder_not_the_beginning_of_a_name(bucket: str) -> None:
    for name in ("train/1", "train2/1"):
        write_object(f"{bucket}/{name}", b"")
    assert [item.uri for item in list_objects(f"{bucket}/train")] == [f"{bucket}/train/1"]


@pytest.mark.parametrize("names", [
    [f"{index:04d}.jpg" for index in range(1203)],
    [f"{index:04d}/x.jpg" for index in range(1203)],
    [f"d{index % 7}/{index:04d}.jpg" for index in range(1203)],
    [f"a{index:04d}.jpg" for index in range(999)] + [f"b{index:03d}/x.jpg" for index in range(204)],
], ids=["flat", "a folder each", "few folders", "folders behind pictures"])  # fmt: skip
def test_listing_of_more_than_a_page_has_everything_once(bucket: str, names: list[str]) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: write_object(f"{bucket}/{name}", b"."), names))
    assert sorted(item.uri for item in list_objects(bucket)) == sorted(f"{bucket}/{name}" for name in names)


def test_faults_of_the_server_are_not_seen(bucket: str, s3: str, connect: Connect) -> None:
    contents = {f"{bucket}/{index}": os.urandom(30_000) for index in range(60)}
    with fault_proxy(s3, share=0.3) as proxy:
        connect(proxy.endpoint)
        for uri, data in contents.items():
            write_object(uri, data)
        assert {item.uri for item in list_objects(bucket)} == contents.keys()
        assert {uri: read_object(uri)[0] for uri in contents} == contents
        assert min(proxy.counts[fault] for fault in ("500", "503", "slow", "cut")) > 0
        proxy.forbidden.add(f"{bucket.removeprefix('s3://')}/7")
        with pytest.raises(ObjectError) as caught:
            read_object(f"{bucket}/7")
        assert caught.value.reason == "forbidden"


def test_what_is_wrong_for_every_object_stops_the_job(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match="cannot list s3://no-such-bucket: NoSuchBucket"):
        list(list_objects("s3://no-such-bucket"))
    with pytest.raises(ServiceError, match="NoSuchBucket"):
        read_object("s3://no-such-bucket/x")
    with pytest.raises(ServiceError, match="no such folder"):
        list(list_objects("/no/such/folder"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    object_store._client.cache_clear()
    with pytest.raises(ServiceError, match="SignatureDoesNotMatch"):
        read_object(f"{bucket}/x")


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(small_disk: Path) -> None:
    write_object(f"{small_disk}/fits", b"x" * 1000)
    with pytest.raises(ServiceError, match="No space left"):
        write_object(f"{small_disk}/too/large", b"x" * 4_000_000)
    assert [item.uri for item in list_objects(str(small_disk))] == [f"{small_disk}/fits"]


def test_a_shard_that_is_dropped_from_the_cache_leaves_its_lock(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may hold it or wait for it: with a new file of that name two would fetch at once."""
    monkeypatch.setenv("AFA_CACHE", str(tmp_path / "cache"))
    index = write_set(tmp_path / "set", shards=2)
    for path in (tmp_path / "set").iterdir():
        write_object(f"{bucket}/set/{path.name}", path.read_bytes())
    files = split_files(f"{bucket}/set", index, "train", cache_gib=1e-9)
    first, second = files(0), files(1)
    assert not first.exists()
    assert second.exists()
    assert first.with_suffix(".lock").exists()
    assert files(0).read_bytes() == (tmp_path / "set" / "train-000000.tar").read_bytes()
