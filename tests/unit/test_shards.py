"""Shard sets: index, integrity, damage, who reads what, and the budget for bad samples."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from afa_core.config import DataConfig
from afa_core.data.sample import encode_sample
from afa_core.data.shards import (
    BadShard,
    DatasetIndex,
    ShardWriter,
    SplitIndex,
    dataset_digest,
    iterate_shard,
    load_dataset_index,
    save_dataset_index,
    verify_shards,
)
from afa_core.data.stream import SampleStream, assign_shards
from afa_core.data.transforms import TrainTransform, collate
from afa_core.errors import InputError

CLASSES = ("cat", "dog")
CONFIG = DataConfig(crop_px=32, loader_workers=0, shuffle_buffer=4)


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (value % 256, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_set(folder: Path, shards: int = 4, samples: int = 5, bad: int = 0) -> DatasetIndex:
    """A set of pictures ``s0-0`` ...; in each shard the first ``bad`` ones are damaged."""
    entries = []
    for shard in range(shards):
        writer = ShardWriter(folder / f"train-{shard:06d}.tar")
        for sample in range(samples):
            data = b"damaged" if sample < bad else picture(sample)
            writer.write(encode_sample(f"s{shard}-{sample}", data, "png", {"tags": ["dog"]}), ["dog"])
        entries.append(writer.close())
    index = DatasetIndex(CLASSES, {"train": SplitIndex(tuple(entries), {"cat": 0, "dog": shards * samples})})
    save_dataset_index(folder, index)
    return index


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


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 99), st.integers(0, 20))
def test_every_shard_has_exactly_one_reader_an_epoch(shards: int, readers: int, seed: int, epoch: int) -> None:
    paths = [Path(str(index)) for index in range(shards)]
    parts = [assign_shards(paths, seed, epoch, reader=reader, readers=readers) for reader in range(readers)]
    assert sorted(itertools.chain(*parts)) == sorted(paths)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_reader_sees_other_shards_in_other_epochs() -> None:
    paths = [Path(str(index)) for index in range(8)]
    seen = {path for epoch in range(20) for path in assign_shards(paths, 0, epoch, reader=0, readers=4)}
    assert seen == set(paths)


def stream(folder: Path, index: DatasetIndex, config: DataConfig = CONFIG, **options: int) -> SampleStream:
    transform = TrainTransform(config, index.classes)
    return SampleStream(folder, index, "train", transform, config, **{"seed": 1, **options})


def test_ranks_and_loaders_share_an_epoch_without_overlap(tmp_path: Path) -> None:
    index = write_set(tmp_path, shards=4, samples=5)
    config = DataConfig(crop_px=32, loader_workers=2, shuffle_buffer=4)
    keys: list[str] = []
    for rank in range(2):
        loader = DataLoader(
            stream(tmp_path, index, config, rank=rank, world_size=2), 5, num_workers=2, collate_fn=collate
        )
        keys += [key for batch in itertools.islice(loader, 2) for key in batch.key]
    assert len(keys) == len(set(keys)) == 20


def test_the_stream_repeats_and_shuffles(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    first, again, other = (
        [item.key for item in itertools.islice(stream(tmp_path, index, seed=seed), 40)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[:20] != sorted(first[:20])
    assert sorted(first[:20]) == sorted(first[20:]) == sorted(set(first))


def test_too_many_bad_samples_stop_the_stream(tmp_path: Path) -> None:
    index = write_set(tmp_path, samples=10, bad=1)
    with pytest.raises(InputError, match=r"cannot be used .*undecodable_image.*first s\d-0"):
        list(itertools.islice(stream(tmp_path, index), 500))
    tolerant = DataConfig(crop_px=32, loader_workers=0, max_bad_share=0.2)
    assert len(list(itertools.islice(stream(tmp_path, index, tolerant), 500))) == 500


def test_more_readers_than_shards_are_refused(tmp_path: Path) -> None:
    index = write_set(tmp_path, shards=2)
    with pytest.raises(InputError, match="2 training shards for 3 readers"):
        stream(tmp_path, index, world_size=3)


def test_crops_come_with_the_box_of_the_picture(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    for item in itertools.islice(stream(tmp_path, index), 40):
        y0, y1, x0, x1 = item.box.tolist()
        assert item.image.shape == (3, 32, 32)
        assert 0 <= y0 < y1 <= 32
        assert 0 <= x0 < x1 <= 32
        outside = torch.ones(32, 32, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        if outside.any():
            assert item.image[:, outside].abs().max() < 0.01  # padding is the mean colour
        assert item.cls_label.tolist() == [0.0, 1.0]
    assert np.isfinite(item.image.numpy()).all()
