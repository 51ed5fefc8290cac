"""One store with every kind of picture that people have, and every kind that is none."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import afa
from labelling import masks_of, picture, rows_of, verified
from PIL import Image

from afa_core.data.sample import PICTURE_MEMBERS
from afa_core.data.shapes import draw
from afa_core.data.shards import iterate_shard, load_dataset_index, shard_paths

pytestmark = pytest.mark.usefixtures("local_ray")

SHAPE = Image.fromarray(draw(9, 3, 64).image)
WIDE = SHAPE.resize((90, 40))


def plant_good(folder: Path) -> dict[str, tuple[int, int]]:
    """Pictures that must be labelled; key -> size of the mask."""
    WIDE.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((np.asarray(WIDE.convert("L")).astype(np.uint16)) * 257).save(folder / "sixteen.png")
    WIDE.quantize(8).save(folder / "palette.png")
    WIDE.convert("RGBA").save(folder / "alpha.png")
    for kind in ("gif", "webp"):
        WIDE.save(folder / f"animated_{kind}.{kind}", save_all=True, append_images=[WIDE.rotate(180)])
    turned = Image.Exif()
    turned[0x0112] = 6
    WIDE.save(folder / "turned.jpg", exif=turned)
    (folder / "really_png.jpg").write_bytes(picture(1))
    (folder / "UPPER.JPG").write_bytes(picture(2, kind="JPEG"))
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    SHAPE.resize((20_000, 10)).save(folder / "strip.png")
    SHAPE.resize((3000, 2000)).save(folder / "large.jpg")
    (folder / "ünï <b>&'\" 名.png").write_bytes(picture(3))
    (folder / "same.png").write_bytes(picture(4))
    (folder / "same.jpg").write_bytes(picture(5, kind="JPEG"))
    wide = dict.fromkeys(("cmyk", "sixteen", "palette", "alpha", "animated_gif", "animated_webp"), (90, 40))
    square = dict.fromkeys(("really_png", "UPPER", "ünï <b>&'\" 名", "same"), (64, 64))
    return wide | square | {"turned": (40, 90), "dot": (1, 1), "strip": (20_000, 10), "large": (3000, 2000)}


def plant_bad(folder: Path) -> dict[str, str]:
    """What must be quarantined; key -> reason."""
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes(picture(6, 256, kind="JPEG")[:2000])
    (folder / "text.png").write_text("no picture")
    Image.new("1", (11_000, 11_000)).save(folder / "bomb.png")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / os.fsdecode(b"no\xfftext.png")).write_bytes(picture(7))
    return {
        "itself": "unreadable",
        "no?text": "bad_path",
        "empty": "undecodable_image",
        "cut": "undecodable_image",
        "text": "undecodable_image",
        "bomb": "too_many_pixels",
        "gone": "missing_object",
    }


def plant_shards(folder: Path) -> dict[str, str]:
    """Shards with names that would leave their folder, one name twice, and one that is cut short; key -> reason."""
    names = ["fine.png", "/etc/absolute.png", "../../up.png", "fine.png", "alone.txt", os.fsdecode(b"no\xfftext.png")]
    tags = json.dumps({"tags": ["disc", "\ud800"]}).encode()
    write_tar(
        folder / "names.tar", [*((name, picture(7)) for name in names), ("odd.png", picture(8)), ("odd.json", tags)]
    )
    write_tar(folder / "short.tar", [(f"{index}.png", picture(index)) for index in range(3)])
    cut_short(folder / "short.tar")
    return {"names": "bad_key", "short": "bad_shard"}


def plant_rivals(folder: Path) -> dict[str, bytes]:
    """Names that might be taken for those that keys are made unique with; key of each label -> its picture."""
    drawn = [picture(20 + index) for index in range(12)]
    (folder / "a").mkdir()
    (folder / "a" / "x.png").write_bytes(drawn[0])
    write_tar(folder / "a.tar", [("x.png", drawn[1]), ("b/x.png", drawn[2])])
    write_tar(folder / "a" / "b.tar", [("x.png", drawn[3])])
    (folder / "a~").mkdir()
    (folder / "a~" / "x.png").write_bytes(drawn[4])
    write_tar(folder / "t.tar", list(zip(["fine.png", "q.png", "fine.png", "fine~2.png"], drawn[5:9], strict=True)))
    last_two = [("b.png", picture(3)), ("c.png", picture(3))]
    write_tar(folder / "r.tar", [("rest.png", drawn[9]), ("~rest.png", drawn[10]), *last_two])
    cut_short(folder / "r.tar")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked.png").write_bytes(drawn[11])
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    keys = ["a/x", "a~/x", "a~/b/x", "a/b~/x", "a_/x", "t~/fine", "t~/q", "", "t~/fine~2", "r~/rest", "r~/~rest",
            "link/linked"]  # fmt: skip
    return {key: data for key, data in zip(keys, drawn, strict=True) if key}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def cut_short(path: Path) -> None:
    """Cut a tar in its last picture."""
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 10
    path.write_bytes(path.read_bytes()[:end])


def exported(output: Path, folder: Path) -> dict[str, bytes]:
    """Key -> picture of every label in an export as shards."""
    afa("export", output, "--format", "webdataset", "--output", folder)
    index = load_dataset_index(folder)
    raws = [raw for path in shard_paths(folder, index, "train") for raw in iterate_shard(path)]
    return {raw["__key__"]: next(raw[name] for name in PICTURE_MEMBERS if name in raw) for raw in raws}


def test_every_kind_of_input_is_labelled_or_has_its_reason(bundle: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    good, bad, shards, rivals = (plant(pictures) for plant in (plant_good, plant_bad, plant_shards, plant_rivals))
    printed = afa("label", "--model", bundle, "--input", pictures, "--output", output)
    rows = {row["key"]: row for row in rows_of(output)}
    reasons = {key: row["reason"] for key, row in rows.items() if row["status"] != "ok"}
    alone = {key: reason for key, reason in reasons.items() if "~" not in key}
    assert alone == bad, printed
    assert {(row["input"], row["reason"]) for row in rows.values() if "~" in row["key"] and row["reason"]} >= set(
        shards.items()
    )
    assert reasons["t~2/fine"] == "duplicate_key"
    assert {reasons["r~rest"], reasons["short~rest"]} == {"bad_shard"}
    sizes = {key: mask.size for key, mask in masks_of(output).items()}
    assert good.items() <= sizes.items()
    assert len([key for key in sizes if key.startswith("same")]) == 2  # two names that make the same key
    assert {"names~/fine", "short~/0", "names~/odd"} <= sizes.keys()
    assert rows["names~/odd"]["unknown_tags"] == ["\\ud800"]
    assert not any(".." in key or key.startswith("/") for key in rows)
    assert all(row["detail"] for row in rows.values() if row["status"] != "ok")
    assert verified(output)
    there = exported(output, tmp_path / "shards")
    assert there.keys() == sizes.keys()
    assert {key: there[key] for key in rivals} == rivals
    assert "quarantined inputs are tried again" in afa(
        "label", "--model", bundle, "--input", pictures, "--output", output, "--only", "quarantined"
    )
    assert {row["key"]: row["reason"] for row in rows_of(output) if row["reason"]} == reasons
    assert verified(output)
