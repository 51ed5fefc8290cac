"""One store with every kind of picture that people have, and every kind that is none."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import afa
from labelling import masks_of, picture, rows_of, verified
from PIL import Image

from afa_core.data.shapes import draw

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
    return {
        "empty": "undecodable_image",
        "cut": "undecodable_image",
        "text": "undecodable_image",
        "bomb": "too_many_pixels",
        "gone": "missing_object",
    }


def plant_shards(folder: Path) -> dict[str, str]:
    """Shards with names that would leave their folder, one name twice, and one that is cut short; key -> reason."""
    with tarfile.open(folder / "names.tar", "w") as tar:
        for name in ("fine.png", "/etc/absolute.png", "../../up.png", "fine.png", "alone.txt"):
            data = picture(7)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(folder / "short.tar", "w") as tar:
        for index in range(3):
            data = picture(index)
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(folder / "short.tar") as tar:
        cut = tar.getmembers()[2].offset_data + 10
    (folder / "short.tar").write_bytes((folder / "short.tar").read_bytes()[:cut])
    return {"names": "bad_key", "short": "bad_shard"}


def test_every_kind_of_input_is_labelled_or_has_its_reason(bundle: Path, tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "labels"
    pictures.mkdir()
    good, bad, shards = plant_good(pictures), plant_bad(pictures), plant_shards(pictures)
    printed = afa("label", "--model", bundle, "--input", pictures, "--output", output)
    rows = {row["key"]: row for row in rows_of(output)}
    reasons = {key: row["reason"] for key, row in rows.items() if row["status"] != "ok"}
    alone = {key: reason for key, reason in reasons.items() if "/" not in key}
    assert alone == bad, printed
    assert {(row["input"], row["reason"]) for row in rows.values() if "/" in row["key"] and row["reason"]} >= set(
        shards.items()
    )
    sizes = {key: mask.size for key, mask in masks_of(output).items()}
    assert good.items() <= sizes.items()
    assert len([key for key in sizes if key.startswith("same")]) == 2  # two names that make the same key
    assert {"names/fine", "short/0"} <= sizes.keys()
    assert not any(".." in key or key.startswith("/") for key in rows)
    assert all(row["detail"] for row in rows.values() if row["status"] != "ok")
    assert verified(output)
