"""Decoding of samples: every kind of picture people have, and everything that must not pass."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afa_core.data.sample import BadSample, check_key, decode_image, decode_sample, decode_seg_label, encode_mask

CLASSES = ("cat", "dog")


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_of(call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(BadSample) as caught:
        call(*arguments, **keywords)
    return caught.value.reason


GRADIENT = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (GRADIENT, "JPEG"),
        (GRADIENT.convert("CMYK"), "JPEG"),
        (GRADIENT.convert("L"), "PNG"),
        (GRADIENT.convert("1"), "PNG"),
        (GRADIENT.convert("P"), "GIF"),
        (GRADIENT.convert("RGBA"), "WEBP"),
        (GRADIENT.convert("LA"), "PNG"),
        (GRADIENT, "BMP"),
        (GRADIENT, "TIFF"),
    ],
)
def test_every_mode_becomes_rgb(picture: Image.Image, kind: str) -> None:
    image = decode_image(encoded(picture, kind), 100)
    assert image.shape == (4, 4, 3)
    assert image.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encoded(Image.fromarray(values)), 100)
    assert image[0, :, 0].tolist() == [0, 127, 255]


def test_orientation_is_the_displayed_one() -> None:
    picture = Image.fromarray(np.zeros((2, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_image(encoded(picture, "JPEG", exif=exif), 100).shape == (6, 2, 3)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    image = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 100)
    assert image[0, 0].tolist() == [255, 0, 0]


def test_transparent_pixels_lie_on_white() -> None:
    image = decode_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), 100)
    assert image.min() == 255


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable_image"),
        (b"not a picture", "undecodable_image"),
        (encoded(GRADIENT.resize((200, 200)), "JPEG")[:600], "undecodable_image"),
        (bomb(20_000, 20_000), "too_many_pixels"),
        (bomb(100_000, 100_000), "too_many_pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "undecodable_image"),  # formats that run a program are not on the list
    ],
)
def test_bad_pictures_have_a_reason(data: bytes, reason: str) -> None:
    assert reason_of(decode_image, data, 100) == reason


@given(st.binary(max_size=300))
def test_any_bytes_give_a_picture_or_a_reason(data: bytes) -> None:
    for start in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF"):
        try:
            assert decode_image(start + data, 1).ndim == 3
        except BadSample as bad:
            assert bad.reason in ("undecodable_image", "too_many_pixels")


@pytest.mark.parametrize("key", ["a", "train/0001", "ä ö", "a-b_c/d"])
def test_good_keys(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../a", "a/../b", "a.b", "a//b", "a\\b", "a\x00b", "a/", "x" * 600])
def test_keys_that_could_leave_their_folder_are_refused(key: str) -> None:
    assert reason_of(check_key, key) == "bad_key"


def raw(**members: bytes) -> dict[str, Any]:
    return {"__key__": "a", "png": encoded(GRADIENT), **members}


def test_tags_from_json_and_cls() -> None:
    facts = json.dumps({"tags": ["dog"], "source": "x"}).encode()
    assert decode_sample(raw(json=facts), CLASSES, 100).tags == ("dog",)
    assert decode_sample(raw(json=facts, cls=b"0"), CLASSES, 100).tags == ("dog",)
    assert decode_sample(raw(cls=b"0"), CLASSES, 100).tags == ("cat",)
    assert decode_sample(raw(pickle=b"ignored", txt=b"ignored"), CLASSES, 100).tags is None


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"json": b"{"}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": b'{"tags": "dog"}'}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"cls": b"two"}, "bad_cls"),
        ({"cls": b"7"}, "bad_cls"),
        ({"png": b""}, "undecodable_image"),
        ({"seg.png": b"x"}, "bad_seg"),
        ({"seg.png": encoded(GRADIENT)}, "bad_seg"),
        ({"seg.png": encode_mask(np.zeros((3, 3), np.uint8))}, "size_mismatch"),
    ],
)
def test_bad_members_have_a_reason(members: dict[str, bytes], reason: str) -> None:
    assert reason_of(decode_sample, raw(**members), CLASSES, 100, with_seg=True) == reason


def test_a_sample_needs_a_picture() -> None:
    assert reason_of(decode_sample, {"__key__": "a", "json": b"{}"}, CLASSES, 100) == "no_image"


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31))
def test_masks_survive_the_round_trip(height: int, width: int, seed: int) -> None:
    label = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    assert np.array_equal(decode_seg_label(encode_mask(label)), label)
    assert Image.open(io.BytesIO(encode_mask(label))).mode == "P"
