"""Pictures of every size and every mode of labelling: masks of the right size, only the tags' classes, sane doubts."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afa_core.checkpoint import Bundle, load_bundle
from afa_core.classes import SHAPES
from afa_core.data.sample import BadSample, decode_image
from afa_core.data.shapes import draw
from afa_core.labelling import label_pictures, to_full_size, to_working_picture, working_size
from afa_core.picture_label import Opinions, describe


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> Bundle:
    return load_bundle(bundle)


@pytest.mark.parametrize("changes", [
    {}, {"head": "segmentation"}, {"head": "agreement"}, {"refine": "none"}, {"refine": "par"}, {"refine": "affinity"},
    {"crf": True}, {"crf": True, "head": "agreement"}, {"scales": (0.5, 1.0)}, {"ignore_band": True},
    {"background_score": 0.0}, {"tags": "predicted"},
], ids=str)  # fmt: skip
def test_every_mode_labels_with_the_tags_alone(loaded: Bundle, changes: dict[str, object]) -> None:
    config = dataclasses.replace(loaded.label_config, **changes)
    images = [draw(3, index, 64).image for index in range(3)]
    tags = [["disc", "unicorn"], [], None]
    for label, given_tags in zip(label_pictures(loaded, images, tags, config), tags, strict=True):
        allowed = {0, 255} | {SHAPES.index(name) + 1 for name in label.tags}
        assert set(np.unique(label.label)) <= allowed
        assert label.tags_given == (given_tags is not None and config.tags != "predicted")
        shares = [label.confidence, label.ignored_share, label.disagreement, label.uncertainty, *label.area.values()]
        assert all(0 <= share <= 1 for share in shares), shares
        assert (label.affinity_disagreement is None) == ("affinity" not in config.refine)
        assert sum(label.area.values()) <= 1 + 1e-6
        if given_tags == [] and config.tags != "predicted":
            assert set(np.unique(label.label)) <= {0, 255}
    first = label_pictures(loaded, images[:1], tags[:1], config)[0]
    assert ("unicorn" in first.unknown_tags) == (config.tags != "predicted")


def test_doubts_of_a_known_case() -> None:
    """Four columns: both say background, they differ, both say disc, ignored by the maps."""
    cam = torch.tensor([[0, 0, 1, 255]]).repeat(4, 1)
    segmentation = torch.tensor([[0, 1, 1, 1]]).repeat(4, 1)
    share = torch.where(cam == 0, 0.5, 0.25)
    changes = torch.zeros(4, 4, dtype=torch.bool)
    changes[0] = True
    opinions = Opinions(cam, share, cam, segmentation, changes)
    sums = opinions.sums(torch.tensor([1])).tolist()
    label = describe(sums, cam.numpy().astype(np.uint8), ("disc", "ring"), ("disc",), ["disc", "cat"], ("disc", "ring"))
    assert label.area == {"disc": 0.25}
    assert label.class_confidence == {"disc": 0.25}
    assert label.confidence == pytest.approx((0.5 * 2 + 0.25) / 3)
    assert label.ignored_share == 0.25
    assert label.disagreement == pytest.approx(1 / 3)
    assert label.class_disagreement == {"disc": 0.5}
    assert label.affinity_disagreement == 0.25
    assert label.tags_without_pixels == ()
    assert label.classes_without_tag == ("ring",)
    assert label.unknown_tags == ("cat",)
    assert label.uncertainty == pytest.approx((1 / 3 + 1 - 1.25 / 3 + 0.25 + 1 + 0.25) / 5)


def test_a_picture_in_which_nothing_was_found_is_looked_at_before_one_that_is_sure() -> None:
    empty = torch.zeros(4, 4, dtype=torch.int64)
    sums = Opinions(empty, torch.ones(4, 4), empty, empty, None).sums(torch.tensor([], dtype=torch.int64)).tolist()
    pixels = empty.numpy().astype(np.uint8)
    nothing_found = describe(sums, pixels, ("disc", "ring"), (), None, ())
    known_to_be_empty = describe(sums, pixels, ("disc", "ring"), (), [], ())
    assert (nothing_found.confidence, known_to_be_empty.confidence) == (0, 1)
    assert nothing_found.uncertainty == 0.25
    assert known_to_be_empty.uncertainty == 0


def test_more_pixels_than_a_number_of_32_bits_counts_exactly() -> None:
    label, share = torch.zeros((), dtype=torch.int64).expand(4097, 4099), torch.ones(()).expand(4097, 4099)
    sums = Opinions(label, share, label, label, None).sums(torch.tensor([], dtype=torch.int64)).tolist()
    assert sums[:2] == [4097 * 4099] * 2
    assert describe(sums, np.zeros((1, 1), np.uint8), ("disc",), (), [], ()).ignored_share == 0


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90))
def test_labels_brought_to_full_size_are_nearest_neighbours(height: int, width: int, full_h: int, full_w: int) -> None:
    label = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    full = to_full_size(label, (full_h, full_w))
    assert full.shape == (full_h, full_w)
    assert full[0, 0] == label[0, 0]
    assert full[-1, -1] == label[(full_h - 1) * height // full_h, (full_w - 1) * width // full_w]
    if (full_h, full_w) == (height, width):
        assert np.array_equal(full, label)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (3000, 2000), (129, 64)])
def test_any_size_is_worked_on_at_a_bounded_one(size: tuple[int, int]) -> None:
    picture = to_working_picture(np.full((*size, 3), 200, np.uint8), 128)
    assert tuple(picture.image.shape[:2]) == working_size(*size, 128)
    assert max(picture.image.shape[:2]) <= 128
    assert picture.full_size == size
    assert (picture.image == 200).all()  # a plain picture stays plain


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_every_kind_are_decoded() -> None:
    red = Image.new("RGB", (6, 4), (250, 10, 10))
    alpha = red.convert("RGBA")
    alpha.putalpha(0)
    frames = [red, Image.new("RGB", (6, 4), (10, 10, 250))]
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    cases = {
        "cmyk": encoded(red.convert("CMYK"), "JPEG"),
        "palette": encoded(red.convert("P"), "PNG"),
        "alpha": encoded(alpha, "PNG"),
        "16 bit": encoded(Image.fromarray(np.full((4, 6), 40_000, np.uint16)), "PNG"),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "rotated": encoded(red, "JPEG", exif=exif),
    }
    colours = {name: decode_image(data, 1.0) for name, data in cases.items()}
    assert colours.pop("rotated").shape == (6, 4, 3)
    assert colours.pop("alpha").mean() == 255  # transparent is white
    assert abs(float(colours.pop("16 bit").mean()) - 40_000 / 257) < 1
    for name, pixels in colours.items():
        assert pixels.shape == (4, 6, 3), name
        assert pixels[..., 0].min() > 200, name
        assert pixels[..., 1:].max() < 80, name


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "P, one clear", "RGB, one clear", "1", "PA"])
def test_a_picture_converted_in_strips_is_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afa_core.data.sample.STRIP_PIXELS", 200)
    noise = np.random.default_rng(0).integers(0, 256, (47, 53, 4), dtype=np.uint8)
    picture = Image.fromarray(noise).convert(mode.partition(",")[0])
    clear = {"P, one clear": 3, "RGB, one clear": tuple(map(int, noise[3, 4, :3]))}.get(mode)
    options = {} if clear is None else {"transparency": clear}
    data = encoded(picture, "TIFF" if mode == "PA" else "PNG", **options)
    whole = Image.open(io.BytesIO(data))
    if whole.has_transparency_data:
        whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole.convert("RGBA"))
    assert np.array_equal(decode_image(data, 1.0), np.asarray(whole.convert("RGB")))


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "undecodable_image"),
    (b"<html>", "undecodable_image"),
    (encoded(Image.fromarray(draw(1, 1, 64).image), "JPEG")[:700], "undecodable_image"),
    (encoded(Image.new("1", (30_000, 30_000)), "PNG"), "too_many_pixels"),
], ids=["empty", "html", "cut", "bomb"])  # fmt: skip
def test_pictures_that_cannot_be_used_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, 100.0)
    assert caught.value.reason == reason
