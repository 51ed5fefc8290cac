"""``afa export``: labels of a store with every kind of name and picture come back bit for bit through other readers."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from commands import afa, afa_running, pip_install
from generated_labels import write_run
from label_studio_sdk.converter.brush import decode_rle
from labelling import masks_of, picture
from PIL import Image
from pycocotools.coco import COCO

from afa_core.classes import SHAPES
from afa_core.data.shards import iterate_samples, load_dataset_index, shard_paths, verify_shards
from pipelines.cli import main

pytestmark = pytest.mark.usefixtures("local_ray")

READERS = Path(__file__).parents[1] / "readers"
Masks = dict[str, np.ndarray]


def turned(index: int) -> bytes:
    """A JPEG of 64 x 48 that has to be shown as 48 x 64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(index))).resize((64, 48)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def changed(index: int, mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(index))).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


FILES: dict[str, Callable[[int], bytes]] = {
    "plain.png": picture,
    "plain.jpg": lambda index: picture(index, kind="JPEG"),
    "a/same.png": picture,
    "b/same.png": picture,
    "with blank.png": picture,
    "# hash.png": picture,
    "100%.png": picture,
    "straße/犬.jpg": lambda index: picture(index, kind="JPEG"),
    "turned.jpg": turned,
    "grey.png": lambda index: changed(index, "L"),
    "palette.png": lambda index: changed(index, "P"),
    "alpha.png": lambda index: changed(index, "RGBA"),
}


@pytest.fixture(scope="module")
def store(local_ray: None, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``labels`` of ``pictures``: tags given for all but one, doubtful pixels ignored."""
    folder = tmp_path_factory.mktemp("store")
    rows = ["path,tags"]
    for index, (name, make) in enumerate(FILES.items()):
        path = folder / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(index))
        rows.append(f'"{name}","{SHAPES[index % 3]},{SHAPES[3]}"')
    (folder / "pictures" / "nothing.png").write_bytes(picture(50))
    (folder / "pictures" / "broken.png").write_bytes(b"not a picture")
    rows += ['nothing.png,""', 'broken.png,"disc"']
    (folder / "pictures" / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    afa("label", "--model", bundle, "--input", folder / "pictures" / "table.csv", "--output", folder / "labels",
        "--unit-size", 5, "--ignore-band", "--workers", 1)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def masks(store: Path) -> Masks:
    found = {key: np.asarray(mask) for key, mask in masks_of(store / "labels").items()}
    assert len(found) == len(FILES) + 1
    shown = set(np.unique(np.concatenate([mask.ravel() for mask in found.values()])))
    assert {0, 255} < shown  # classes, background and ignored pixels
    assert next(mask for key, mask in found.items() if "turned" in key).shape == (64, 48)
    return found


def export(store: Path, output: Path, *words: object, status: int = 0) -> None:
    assert main([str(word) for word in ("export", store / "labels", "--output", output, *words)]) == status


@pytest.fixture(scope="module")
def readers() -> Iterator[Path]:
    """Python of an environment with other people's readers, whose requirements are not this project's; not kept."""
    with tempfile.TemporaryDirectory(prefix="afa-readers-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip_install(python, "-r", READERS / "requirements.txt")
        yield python


def read_by(python: Path, script: str, folder: Path, output: Path) -> tuple[Masks, Any]:
    """Masks by name as another library reads them, and the names of their values."""
    command = [python, READERS / script, folder, output]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    facts = json.loads(output.with_suffix(".json").read_text())
    with np.load(output) as arrays:
        return {key: arrays[str(number)] for number, key in enumerate(facts["keys"])}, facts["names"]


def plain_size(path: Path | io.BytesIO) -> tuple[int, int]:
    """Height and width for a reader that knows no EXIF."""
    with Image.open(path) as found:
        return found.height, found.width


def test_coco_through_pycocotools(store: Path, masks: Masks, tmp_path: Path) -> None:
    export(store, tmp_path / "coco", "--format", "coco")
    coco = COCO(str(tmp_path / "coco" / "annotations" / "instances.json"))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == [*SHAPES, "ignored"]
    assert sorted(coco.getImgIds()) == list(range(1, len(masks) + 1))
    for image in coco.loadImgs(coco.getImgIds()):
        expected = masks[image["key"]]
        again = np.zeros((image["height"], image["width"]), np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            part = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == part.sum()
            rows, columns = np.nonzero(part)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == box
            again[part] = annotation["category_id"]
        assert np.array_equal(again, expected), image["key"]
        assert plain_size(tmp_path / "coco" / "images" / image["file_name"]) == expected.shape
    export(store, tmp_path / "bare", "--format", "coco", "--without-pictures")
    assert not (tmp_path / "bare" / "images").exists()


def test_voc_as_its_readers_walk_it(store: Path, masks: Masks, tmp_path: Path) -> None:
    export(store, tmp_path / "voc", "--format", "voc", "--val-share", 0.4)
    lists = tmp_path / "voc" / "ImageSets" / "Segmentation"
    names = {split: (lists / f"{split}.txt").read_text().split() for split in ("train", "val", "trainval")}
    assert sorted(names["train"] + names["val"]) == sorted(names["trainval"])
    assert len(names["trainval"]) == len(set(names["trainval"])) == len(masks)
    assert names["val"]
    keys = {}
    for line in (tmp_path / "voc" / "pictures.csv").read_text(encoding="utf-8").splitlines()[1:]:
        keys[line.split(",")[0]] = line.split(",")[1]
    for name in names["trainval"]:
        with Image.open(tmp_path / "voc" / "SegmentationClass" / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]  # type: ignore[index]
            assert np.array_equal(np.asarray(mask), masks[keys[name]]), name
        with Image.open(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg") as found:
            assert found.format == "JPEG"
            assert (found.height, found.width) == masks[keys[name]].shape


def test_label_studio_through_its_own_converter(store: Path, masks: Masks, tmp_path: Path) -> None:
    export(store, tmp_path / "studio", "--format", "labelstudio")
    config = ElementTree.parse(tmp_path / "studio" / "labeling_config.xml")
    brushes = [label.get("value") for label in config.iter("Label")]
    assert brushes == [*SHAPES, "ignored"]
    values = {**{name: index for index, name in enumerate(SHAPES, start=1)}, "ignored": 255}
    tasks = json.loads((tmp_path / "studio" / "tasks-000.json").read_text())
    assert {task["data"]["key"] for task in tasks} == set(masks)
    for task in tasks:
        (prediction,) = task["predictions"]
        assert prediction["model_version"]
        assert 0 <= prediction["score"] <= 1
        expected = masks[task["data"]["key"]]
        again = np.zeros(expected.shape, np.uint8)
        for result in prediction["result"]:
            height, width = result["original_height"], result["original_width"]
            ink = decode_rle(result["value"]["rle"]).reshape(height, width, 4)[..., 3]
            again[ink > 0] = values[result["value"]["brushlabels"][0]]
        assert np.array_equal(again, expected), task["data"]["key"]
        served = parse_qs(urlsplit(task["data"]["image"]).query)["d"][0]
        assert plain_size(tmp_path / served) == expected.shape


def test_cvat_archive_by_its_colours(store: Path, masks: Masks, tmp_path: Path) -> None:
    export(store, tmp_path / "cvat", "--format", "cvat")
    with zipfile.ZipFile(tmp_path / "cvat" / "labels-000.zip") as archive:
        lines = archive.read("labelmap.txt").decode().splitlines()[1:]
        colours = {line.split(":")[0]: tuple(map(int, line.split(":")[1].split(","))) for line in lines}
        assert list(colours) == ["background", *SHAPES, "ignored"]
        assert len(set(colours.values())) == len(colours)
        values = dict(zip(colours.values(), [*range(len(SHAPES) + 1), 255], strict=True))
        listed = archive.read("ImageSets/Segmentation/default.txt").decode().splitlines()
        assert len(listed) == len(masks)
        again = []
        for name in listed:
            (picture_name,) = [found for found in archive.namelist() if found.startswith(f"JPEGImages/{name}.")]
            rgb = np.asarray(Image.open(io.BytesIO(archive.read(f"SegmentationClass/{name}.png"))).convert("RGB"))
            mask = np.array([values[tuple(pixel)] for pixel in rgb.reshape(-1, 3)], np.uint8).reshape(rgb.shape[:2])
            assert plain_size(io.BytesIO(archive.read(picture_name))) == mask.shape
            again.append(mask.tobytes())
        assert sorted(again) == sorted(mask.tobytes() for mask in masks.values())


def test_cvat_archive_through_datumaro(store: Path, masks: Masks, readers: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "cvat", "--format", "cvat")
    found, names = read_by(readers, "read_cvat.py", tmp_path / "cvat", tmp_path / "found.npz")
    assert names == ["background", *SHAPES, "ignored"]
    values = np.array([*range(len(SHAPES) + 1), 255], np.uint8)
    assert {unquote(name): values[mask].tobytes() for name, mask in found.items()} == as_bytes(masks)


def test_fiftyone_samples_through_its_own_library(store: Path, masks: Masks, readers: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "fiftyone", "--format", "fiftyone")
    found, targets = read_by(readers, "read_fiftyone.py", tmp_path / "fiftyone", tmp_path / "found.npz")
    assert targets == {"0": "background", **{str(i): name for i, name in enumerate(SHAPES, 1)}, "255": "ignored"}
    assert as_bytes(found) == as_bytes(masks)


def as_bytes(masks: Masks) -> dict[str, bytes]:
    return {key: mask.tobytes() for key, mask in masks.items()}


def test_fiftyone_layout(store: Path, masks: Masks, tmp_path: Path) -> None:
    folder = tmp_path / "fiftyone"
    export(store, folder, "--format", "fiftyone")
    targets = json.loads((folder / "metadata.json").read_text())["info"]["default_mask_targets"]
    assert targets == {"0": "background", **{str(i): name for i, name in enumerate(SHAPES, 1)}, "255": "ignored"}
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    assert len(samples) == len(masks)
    for sample in samples:
        expected = masks[sample["key"]]
        assert np.array_equal(np.asarray(Image.open(folder / sample["pseudo_label"]["mask_path"])), expected)
        assert plain_size(folder / sample["filepath"]) == expected.shape


def test_shards_train_a_supervised_model(store: Path, masks: Masks, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    export(store, folder, "--format", "webdataset", "--val-share", 0.3, "--samples-per-shard", 4)
    index = load_dataset_index(folder)
    assert index.classes == SHAPES
    assert index.lineage is not None
    verify_shards(folder, index, index.splits)
    seen = {}
    for split in index.splits:
        for sample in iterate_samples(shard_paths(folder, index, split), index.classes, with_seg=True):
            assert sample.seg_label is not None
            assert sample.image.shape[:2] == sample.seg_label.shape  # EXIF is known here
            seen[sample.key] = sample.seg_label
    assert as_bytes(seen) == as_bytes(masks)


@pytest.mark.parametrize(("words", "said"), [
    (["--format", "coco", "--val-share", "0.5"], "--val-share: coco has no splits"),
    (["--format", "voc", "--without-pictures"], "voc needs its pictures"),
    (["--format", "voc", "--val-share", "2"], "must lie between 0 and 1"),
    (["--format", "coco", "--run", "nothing"], "nothing"),
    (["--format", "coco", "--samples-per-shard", "4"], "only webdataset has"),
], ids=str)  # fmt: skip
def test_mistakes_are_one_line(
    store: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, tmp_path / "out", *words, status=2)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    export(store, tmp_path, "--format", "coco", status=2)
    assert str(tmp_path) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_pictures_that_are_gone_are_named_and_the_rest_exported(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(store / "pictures" / "grey.png", tmp_path / "grey.png")
    try:
        export(store, tmp_path / "coco", "--format", "coco")
    finally:
        shutil.move(tmp_path / "grey.png", store / "pictures" / "grey.png")
    printed = capsys.readouterr().out
    assert f"labels {len(FILES) + 1}  exported {len(FILES)}  left out 1" in printed
    assert "grey: missing_object" in printed


def test_a_killed_export_has_no_name_yet_and_can_be_done_again(tmp_path: Path) -> None:
    write_run(tmp_path / "labels", "run-00000001", 3000)
    output, partial = tmp_path / "coco", tmp_path / "coco.partial"
    words = ["export", tmp_path / "labels", "--format", "coco", "--output", output]
    with afa_running(*words, until=lambda: len(list(partial.rglob("*.*"))) > 20) as process:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert partial.is_dir()
    assert not output.exists()
    afa(*words)
    assert not partial.exists()
    assert COCO(str(output / "annotations" / "instances.json")).getImgIds()
