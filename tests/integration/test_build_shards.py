"""``afa shards``: VOC's layout and people's own folders, and everything that can be wrong with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from afa_core.data.sample import Sample
from afa_core.data.shards import iterate_samples, load_dataset_index, shard_paths
from pipelines import cli

pytestmark = pytest.mark.usefixtures("local_ray")

TAGS = {"a.png": "cat", "deep/b.jpg": "dog;cat", "c.PNG": "", "d.png": "dog, dog"}


def afa(*words: object) -> int:
    return cli.main([str(word) for word in words])


def picture(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 18), (value, 20, 200)).save(path)
    return path


def samples(folder: Path) -> dict[str, Sample]:
    index = load_dataset_index(folder)
    return {
        sample.key: sample
        for split in index.splits
        for sample in iterate_samples(shard_paths(folder, index, split), index.classes, with_seg=True)
    }


def write_csv(folder: Path) -> Path:
    with (folder / "tags.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "tags"), *TAGS.items()])
    return folder / "tags.csv"


def write_jsonl(folder: Path) -> Path:
    rows = [{"path": path, "tags": [tag.strip() for tag in tags.replace(";", ",").split(",") if tag.strip()]}
            for path, tags in TAGS.items()]  # fmt: skip
    (folder / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "tags.jsonl"


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.table({"path": list(TAGS), "tags": list(TAGS.values())}), folder / "tags.parquet")
    return folder / "tags.parquet"


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_a_folder_with_a_table_of_tags(write: Callable[[Path], Path], tmp_path: Path) -> None:
    for name in TAGS:
        picture(tmp_path / "in" / name)
    assert afa("shards", "folder", tmp_path / "in", tmp_path / "out", "--labels", write(tmp_path)) == 0
    assert load_dataset_index(tmp_path / "out").classes == ("cat", "dog")
    found = {key: sample.tags for key, sample in samples(tmp_path / "out").items()}
    assert found == {"a": ("cat",), "deep/b": ("dog", "cat"), "c": (), "d": ("dog",)}


def test_a_folder_with_class_named_sub_folders_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(6):
        picture(tmp_path / "in" / ("cat" if index % 2 else "dog") / f"{index}.png")
    picture(tmp_path / "in" / "loose.png")  # no sub-folder, no tag: not named by anything
    (tmp_path / "masks" / "cat").mkdir(parents=True)
    Image.fromarray(np.full((18, 24), 1, np.uint8)).save(tmp_path / "masks" / "cat" / "1.png")
    assert afa("shards", "folder", tmp_path / "in", tmp_path / "out", "--masks", tmp_path / "masks",
               "--val-share", 0) == 0  # fmt: skip
    found = samples(tmp_path / "out")
    assert {key: sample.tags for key, sample in found.items()} == {
        f"{'cat' if index % 2 else 'dog'}/{index}": ("cat" if index % 2 else "dog",) for index in range(6)
    }
    assert found["cat/1"].seg_label is not None
    assert found["cat/3"].seg_label is None
    assert "shard 1/1" in capsys.readouterr().out


def test_whatever_is_wrong_is_left_out_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    picture(source / "good.png")
    picture(source / "twice.png")
    picture(source / "twice.jpg")
    (source / "torn.png").write_bytes(picture(source / "whole.png").read_bytes()[:60])
    rows = [("good.png", "cat,griffin"), ("twice.png", "cat"), ("twice.jpg", "cat"), ("torn.png", "dog"),
            ("gone.png", "dog"), ("../outside.png", "dog")]  # fmt: skip
    with (tmp_path / "tags.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("path", "tags"), *rows])
    words = ["shards", "folder", source, tmp_path / "out", "--labels", tmp_path / "tags.csv",
             "--classes", "cat,dog,emu", "--val-share", 0]  # fmt: skip
    assert afa(*words) == 0
    printed = capsys.readouterr().out
    assert set(samples(tmp_path / "out")) == {"good", "twice"}
    for said in ("duplicate_key: 1", "undecodable_image: 1", "missing_file: 1", "unknown_tag: 1", "griffin",
                 "no picture of train has the class emu"):  # fmt: skip
        assert said in printed
    assert "outside" in printed
    assert afa(*words) == 2
    assert "holds a shard set already" in capsys.readouterr().err
    assert afa(*words, "--overwrite", "--strict") == 2
    assert "--strict: 5 problems" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert afa(*words) == 2
    assert "an unfinished shard set" in capsys.readouterr().err
    assert afa(*words, "--overwrite") == 0
    (tmp_path / "out" / "thesis.txt").touch()
    assert afa(*words, "--overwrite") == 2
    assert "holds something else (thesis.txt)" in capsys.readouterr().err


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Four pictures: tags from XML, from the mask, from broken XML, from hostile XML."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for key in ("xml", "mask", "broken", "bomb"):
        picture(root / "JPEGImages" / f"{key}.jpg")
    label = np.zeros((18, 24), np.uint8)
    label[:9, :6], label[9:, :6], label[0, :] = 8, 12, 255  # cat, dog
    Image.fromarray(label).save(root / "SegmentationClass" / "mask.png")
    named = "<annotation><object><name>dog</name><part><name>head</name></part></object></annotation>"
    (root / "Annotations" / "xml.xml").write_text(named)
    (root / "Annotations" / "broken.xml").write_text("<annotation>")
    (root / "Annotations" / "bomb.xml").write_text('<!DOCTYPE a [<!ENTITY b "dog">]>' + named.replace("dog", "&b;"))
    (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("xml\nmask\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("broken\nbomb\n")
    return root


def test_voc_takes_tags_from_annotations_else_from_masks(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert afa("shards", "voc", voc, tmp_path / "out") == 0
    found = samples(tmp_path / "out")
    assert {key: sample.tags for key, sample in found.items()} == {"xml": ("dog",), "mask": ("cat", "dog")}
    assert "bad_annotation: 2" in capsys.readouterr().out
    # A file that is there but cannot be read is a reason, too. (A folder, because root may read every file.)
    (voc / "JPEGImages" / "xml.jpg").unlink()
    (voc / "JPEGImages" / "xml.jpg").mkdir()
    assert afa("shards", "voc", voc, tmp_path / "out", "--overwrite") == 0
    assert "unreadable: 1" in capsys.readouterr().out


def test_other_classes_of_a_mask_become_ignored_not_background(voc: Path, tmp_path: Path) -> None:
    assert afa("shards", "voc", voc, tmp_path / "out", "--classes", "dog,horse") == 0
    label = samples(tmp_path / "out")["mask"].seg_label
    assert label is not None
    assert label[12, 0] == 1
    assert label[5, 0] == 255
    assert label[5, 20] == 0
    assert label[0, 20] == 255


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train-list", "nothing"], "no list 'nothing'"),
        (["--classes", "cat,cat"], "cat"),
        (["--samples-per-shard", "0"], "--samples-per-shard 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert afa("shards", "voc", voc, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
