"""The fast JPEG decoder gives what Pillow gives, refuses what Pillow refuses, and never less than the size needed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from afa_core.data import sample
from afa_core.data.jpeg import decode_jpeg, jpeg_size
from afa_core.data.sample import BadSample, decode_image, decode_picture, decode_sample, encode_mask

Pixels = NDArray[np.uint8]


def photograph(height: int = 90, width: int = 140) -> Image.Image:
    """Smooth colours with a little noise."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 25 + channel) + np.cos(columns / (30 + channel)) for channel in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, 2) * 55 + 128 + noise, 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def by_pillow(data: bytes) -> Pixels:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


KINDS = {
    "plain": jpeg(photograph()),
    "full_colour": jpeg(photograph(), subsampling=0),
    "odd_size": jpeg(photograph(91, 143)),
    "progressive": jpeg(photograph(), progressive=True),
    "grey": jpeg(photograph().convert("L")),
    "rgb": jpeg(photograph(), keep_rgb=True),
    "cmyk": jpeg(photograph().convert("CMYK")),
    "restarts": jpeg(photograph(), restart_marker_rows=1),
    "dot": jpeg(photograph(1, 1)),
    **{f"turned_{number}": jpeg(photograph(), exif=turned(number)) for number in range(1, 9)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_pillows(kind: str) -> None:
    assert np.array_equal(decode_image(KINDS[kind], 100), by_pillow(KINDS[kind]))


def test_orientation_in_xmp_counts() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = jpeg(photograph(), xmp=xmp)
    assert by_pillow(data).shape == (140, 90, 3)
    assert np.array_equal(decode_image(data, 100), by_pillow(data))


@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "cmyk", "turned_6"])
def test_a_cut_picture_is_refused_where_pillow_refuses_it(kind: str) -> None:
    whole = KINDS[kind]
    for end in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 3, len(whole) - 2, len(whole) - 1]:
        try:
            expected = by_pillow(whole[:end])
        except OSError:
            with pytest.raises(BadSample, match="undecodable_image"):
                decode_image(whole[:end], 100)
        else:
            assert np.array_equal(decode_image(whole[:end], 100), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_picture_is_what_pillow_makes_of_it(data: st.DataObject) -> None:
    damaged = bytearray(KINDS["plain"])
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        expected = sample._decode_with_pillow(bytes(damaged), 1).pixels
    except BadSample as refused:
        with pytest.raises(BadSample, match=refused.reason):
            decode_image(bytes(damaged), 1)
    else:
        assert np.array_equal(decode_image(bytes(damaged), 1), expected)


def test_a_giant_is_refused_by_its_header() -> None:
    data = bytearray(KINDS["plain"])
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65,535 x 65,535
    with pytest.raises(BadSample, match="too_many_pixels"):
        decode_image(bytes(data), 100)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from(["plain", "odd_size", "turned_6", "grey", "cmyk"]))
def test_a_scaled_picture_has_the_size_needed_and_looks_the_same(height: int, width: int, kind: str) -> None:
    whole = decode_image(KINDS[kind], 100)
    asked: list[tuple[int, int]] = []

    def needed(*full_size: int) -> tuple[int, int]:
        asked.append((full_size[0], full_size[1]))
        return min(height, full_size[0]), min(width, full_size[1])

    picture = decode_picture(KINDS[kind], 100, needed)
    assert picture.full_size == whole.shape[:2]
    assert set(asked) <= {picture.full_size}
    small = picture.pixels.shape[:2]
    assert all(side >= least for side, least in zip(small, needed(*picture.full_size), strict=True))
    assert any(small == tuple(-(-side // divisor) for side in picture.full_size) for divisor in (1, 2, 4, 8))
    expected = Image.fromarray(whole).resize(small[::-1], Image.Resampling.BOX)
    assert np.abs(np.asarray(expected).astype(int) - picture.pixels).mean() < 6


def test_of_a_picture_far_larger_than_needed_an_eighth_is_decoded() -> None:
    data = KINDS["plain"]
    size = jpeg_size(data)
    assert size == (90, 140)
    pixels = decode_jpeg(data, size, (11, 17))
    assert pixels is not None
    assert pixels.shape == (12, 18, 3)


def test_the_mask_keeps_the_full_size() -> None:
    label = np.zeros((90, 140), np.uint8)
    raw = {"__key__": "a", "jpg": KINDS["plain"], "seg.png": encode_mask(label)}
    decoded = decode_sample(raw, (), 100, with_seg=True, needed_size=lambda _height, _width: (20, 20))
    assert decoded.image.shape == (23, 35, 3)
    assert decoded.full_size == (90, 140)
    assert decoded.seg_label is not None
    assert decoded.seg_label.shape == (90, 140)
