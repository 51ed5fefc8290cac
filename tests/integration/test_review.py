"""``afa review apply``: decisions become a shard set that verifies, is scored and remembers where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import afa, error_line
from generated_labels import write_run
from labelling import masks_of, picture
from PIL import Image

from afa_core.data.sample import encode_mask
from afa_core.data.shards import dataset_digest, iterate_samples, load_dataset_index, shard_paths, verify_shards
from afa_core.errors import InputError
from pipelines.cli import main

RUN = "run-00000001"
KEYS = ("a", "b", "c", "d", "e", "f", "g", "bad")  # the eighth of a generated run is quarantined


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    write_run(tmp_path / "labels", RUN, 100, keys=KEYS)
    return tmp_path / "labels"


def apply(labels: Path, text: str, *words: object, status: int = 0) -> Path:
    """The shard set of some decisions."""
    table, output = labels.parent / "review.csv", labels.parent / "shards"
    table.write_text(f"key,decision,note,mask\n{text}", encoding="utf-8")
    command = ["review", "apply", labels, "--decisions", table, "--output", output, *words]
    assert main([str(word) for word in command]) == status
    return output


def members_of(output: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                assert member.name not in found
                found[member.name] = stream.read()
    return found


def test_accept_reject_fix(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrected = np.full((64, 64), 255, np.uint8)
    corrected[:10] = 2
    (labels.parent / "fixed").mkdir()
    Image.fromarray(corrected).save(labels.parent / "fixed" / "d.png")
    output = apply(labels, "a,accept,good,\n./b,reject,,\nc,fix,,\nd,fix,edge,fixed/d.png\ne,accept,,\n")
    members = members_of(output)
    assert {name for name in members if name.endswith(".seg.png")} == {"a.seg.png", "d.seg.png", "e.seg.png"}
    assert {name.split(".")[0] for name in members} == {"a", "d", "e"}
    masks = masks_of(labels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["a.seg.png"]))), np.asarray(masks["a"]))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["d.seg.png"]))), corrected)
    facts = {key: json.loads(members[f"{key}.json"]) for key in ("a", "d")}
    assert facts["a"]["review"] == {"decision": "accept", "run": RUN, "note": "good"}
    assert facts["a"]["source"].endswith("labels-pictures/0.png")
    assert facts["d"]["tags"] == ["square"]
    index = load_dataset_index(output)
    verify_shards(output, index, index.splits)
    assert index.lineage is not None
    table = (labels.parent / "review.csv").read_bytes()
    assert index.lineage["run"] == RUN
    assert index.lineage["decisions"] == {
        "file": "review.csv", "sha256": hashlib.sha256(table).hexdigest(), "accept": 2, "fix": 2, "reject": 1,
    }  # fmt: skip
    assert index.lineage["outcome"] == {
        "accepted": 2, "corrected": 1, "rejected": 1, "waiting_for_mask": 1, "undecided_left_out": 93,
    }  # fmt: skip
    assert dataset_digest(index) == dataset_digest(dataclasses.replace(index, lineage=None))
    assert "waiting for a corrected mask, the first: c" in capsys.readouterr().out


@pytest.mark.parametrize(("undecided", "samples", "masks"), [("drop", 1, 1), ("tags", 97, 1), ("accept", 97, 97)])
def test_what_becomes_of_the_undecided(labels: Path, undecided: str, samples: int, masks: int) -> None:
    output = apply(labels, "a,accept,,\nb,reject,,\n", "--undecided", undecided, "--samples-per-shard", 10)
    members = members_of(output)
    assert sum(name.endswith(".json") for name in members) == samples
    assert sum(name.endswith(".seg.png") for name in members) == masks
    assert load_dataset_index(output).splits["train"].samples == samples


def test_splits_are_drawn_by_key_and_cut_into_shards(labels: Path) -> None:
    words = ("--undecided", "accept", "--val-share", 0.3, "--samples-per-shard", 10)
    index = load_dataset_index(apply(labels, "a,accept,,\n", *words))
    assert sum(split.samples for split in index.splits.values()) == 98
    assert 15 < index.splits["val"].samples < 45
    assert all(shard.samples <= 10 for split in index.splits.values() for shard in split.shards)
    first = dataset_digest(index)
    assert dataset_digest(load_dataset_index(apply(labels, "a,accept,,\n", *words, "--overwrite"))) == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,accept,,\nzzz,accept,,\n", "row 3: no label of 'zzz'"),
        ("bad,accept,,\n", "row 2: no label of 'bad'"),
        ("a,fix,,gone.png\n", "row 2: mask"),
        ("a,fix,,labels-pictures/0.png\n", "mode RGB"),
        ("a,fix,,small.png\n", "3 x 2, its picture 64 x 64"),
        ("a,fix,,foreign.png\n", "value 9, but there are 5 classes"),
    ],
)
def test_nothing_is_written_where_a_row_is_wrong(
    labels: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (labels.parent / "small.png").write_bytes(encode_mask(np.zeros((2, 3), np.uint8)))
    (labels.parent / "foreign.png").write_bytes(encode_mask(np.full((64, 64), 9, np.uint8)))
    output = apply(labels, text, status=2)
    assert said in error_line(capsys.readouterr().err)
    assert not output.exists()


def test_pictures_that_are_lost_are_counted_and_named(labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (labels.parent / "labels-pictures" / "0.png").unlink()
    (labels.parent / "labels-pictures" / "1.png").write_bytes(picture(77))
    index = load_dataset_index(apply(labels, "a,accept,,\nb,accept,,\nc,accept,,\n"))
    assert index.splits["train"].samples == 1
    assert index.lineage is not None
    assert index.lineage["outcome"]["lost"] == 2
    assert "a (missing_object), b (changed_since_listing)" in capsys.readouterr().out


def test_an_empty_set_is_no_set_and_a_full_folder_is_kept(labels: Path) -> None:
    output = apply(labels, "a,reject,,\n", status=2)
    with pytest.raises(InputError):
        load_dataset_index(output)
    apply(labels, "a,accept,,\n")
    apply(labels, "b,accept,,\n", status=2)
    assert "a.seg.png" in members_of(output)
    apply(labels, "b,accept,,\n", "--overwrite")
    assert "a.seg.png" not in members_of(output)


def test_the_run_that_the_table_names_is_the_one_that_counts(labels: Path) -> None:
    write_run(labels, "run-00000002", 100, keys=KEYS, created=2e9)
    table, output = labels.parent / "review.csv", labels.parent / "shards"
    table.write_text(f"key,decision,run\na,accept,{RUN}\n")
    words = ["review", "apply", str(labels), "--decisions", str(table), "--output", str(output)]
    assert main(words) == 0
    lineage: Any = load_dataset_index(output).lineage
    assert lineage["run"] == RUN
    assert main([*words, "--run", "run-00000002", "--overwrite"]) == 2


@pytest.mark.usefixtures("local_ray")
def test_reviewed_labels_are_scored_as_any_shard_set(bundle: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(5):
        (pictures / f"{index}.png").write_bytes(picture(index))
    turned = Image.open(io.BytesIO(picture(9))).resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pictures / "turned.jpg", exif=exif)
    labels, table, shards = tmp_path / "labels", tmp_path / "review.csv", tmp_path / "shards"
    afa("label", "--model", bundle, "--input", pictures, "--output", labels, "--tag-probability", 0.01)
    table.write_text("key,decision\nturned,accept\n")
    words = ["review", "apply", labels, "--decisions", table, "--output", shards, "--undecided", "accept"]
    assert main([str(word) for word in words]) == 0
    index = load_dataset_index(shards)
    samples = {
        sample.key: sample
        for sample in iterate_samples(shard_paths(shards, index, "train"), index.classes, with_seg=True)
    }
    assert samples.keys() == {"0", "1", "2", "3", "4", "turned"}
    turned_label = samples["turned"].seg_label
    assert turned_label is not None
    assert turned_label.shape == (96, 64)
    assert (pictures / "turned.jpg").read_bytes() == members_of(shards)["turned.jpg"]
    assert "miou" in afa("evaluate", bundle, shards, "--split", "train").lower()
