"""Augmentation and its box; the built-in pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from afa_core.classes import SHAPES
from afa_core.config import DataConfig
from afa_core.data.draws import Draws
from afa_core.data.sample import NeededSize, Pixels, Sample
from afa_core.data.shapes import draw
from afa_core.data.train_samples import collate
from afa_core.data.transforms import (
    TrainItem,
    TrainTransform,
    _antialiased_in_floats,
    denormalise_to_unit,
    normalise,
    resized,
    to_network_input,
)


def sample(height: int, width: int, seed: int = 0) -> Sample:
    """A picture with no pixel of the padding's colour."""
    image = np.random.default_rng(seed).integers(130, 256, (height, width, 3), dtype=np.uint8)
    return Sample("key", image, ("disc",), None, "")


def crop_of(item: TrainItem, crop_px: int) -> Tensor:
    """The crop uint8 [S, S, 3] of one sample."""
    return collate([item]).crops(crop_px, torch.device("cpu"))[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(32, 64), st.integers(0, 2**32 - 1))
def test_the_box_holds_the_picture_and_nothing_else(height: int, width: int, crop_px: int, seed: int) -> None:
    config = DataConfig(crop_px=crop_px, rescale=(0.5, 2.0))
    item = TrainTransform(config, SHAPES)(lambda _: sample(height, width), Draws(seed, 0))
    crop = crop_of(item, crop_px)
    assert crop.shape == (crop_px, crop_px, 3)
    y0, y1, x0, x1 = item.box
    assert 0 <= y0 < y1 <= crop_px
    assert 0 <= x0 < x1 <= crop_px
    inside = torch.zeros(crop_px, crop_px, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    padding = (crop == torch.tensor([124, 116, 104])).all(2)  # the mean colour, rounded to whole numbers
    assert torch.equal(padding, ~inside)


def test_the_same_generator_gives_the_same_crop_and_another_one_another() -> None:
    transform = TrainTransform(DataConfig(crop_px=32, photometric_distortion=True), SHAPES)
    items = [transform(lambda _: sample(60, 60), Draws(seed, 0)) for seed in (1, 1, 2)]
    first, again, other = (crop_of(item, 32) for item in items)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_flip_mirrors_columns() -> None:
    config = DataConfig(crop_px=40, rescale=(1.0, 1.0), flip_probability=1.0)
    item = TrainTransform(config, SHAPES)(lambda _: sample(40, 40), Draws(0, 0))
    assert torch.equal(crop_of(item, 40), torch.from_numpy(sample(40, 40).image).flip(1))


def whole_then_cropped(image: Pixels, config: DataConfig, draws: Draws) -> tuple[Pixels, Pixels]:
    """The crop in plain words: rescale all of the picture, mirror all of it, cut; and where the picture is in it."""
    height, width = image.shape[:2]
    scale = draws.uniform(*config.rescale)
    size = max(1, int(width * scale)), max(1, int(height * scale))
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if draws.random() < config.flip_probability:
        whole = whole[:, ::-1]
    crop = np.full((config.crop_px, config.crop_px, 3), (124, 116, 104), np.uint8)
    inside = np.zeros((config.crop_px, config.crop_px), bool)
    places = []
    for side in whole.shape[:2]:
        length = min(side, config.crop_px)
        at, start = draws.below(config.crop_px - length + 1), draws.below(side - length + 1)
        places.append((slice(at, at + length), slice(start, start + length)))
    (top, rows), (left, columns) = places
    crop[top, left], inside[top, left] = whole[rows, columns], True
    return crop, inside


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(48, 64), st.integers(0, 2**32 - 1))
def test_a_picture_that_fits_into_the_crop_is_the_rescaled_picture(
    height: int, width: int, crop_px: int, seed: int
) -> None:
    config, image = DataConfig(crop_px=crop_px, rescale=(0.2, 3.0)), sample(height, width, seed).image
    item = TrainTransform(config, SHAPES)(lambda _: sample(height, width, seed), Draws(seed, 0))
    expected, _ = whole_then_cropped(image, config, Draws(seed, 0))
    assert np.abs(crop_of(item, crop_px).numpy().astype(int) - expected).max() <= 2  # of noise, by another library


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 250), st.integers(1, 250), st.integers(32, 64), st.integers(0, 2**32 - 1))
def test_a_crop_is_the_window_of_the_whole_rescaled_picture(height: int, width: int, crop_px: int, seed: int) -> None:
    config = DataConfig(crop_px=crop_px, rescale=(0.2, 3.0))
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)  # every pixel says where it lies
    made = TrainTransform(config, SHAPES)(lambda _: Sample("key", image, ("disc",)), Draws(seed, 0))
    expected, inside = whole_then_cropped(image, config, Draws(seed, 0))
    assert np.abs(crop_of(made, crop_px).numpy().astype(int) - expected).max() <= 1  # half a pixel, rounded
    y0, y1, x0, x1 = made.box
    assert inside[y0:y1, x0:x1].all()
    assert inside.sum() == (y1 - y0) * (x1 - x0)


def test_a_picture_that_is_shrunk_is_asked_for_at_its_rescaled_size() -> None:
    config = DataConfig(crop_px=32, rescale=(0.25, 0.25), flip_probability=0.0)
    asked: list[tuple[int, int]] = []

    def decode(needed_size: NeededSize) -> Sample:
        asked.append(needed_size(402, 600))
        half = np.full((201, 300, 3), 200, np.uint8)
        return Sample("key", half, ("disc",), unscaled_size=(402, 600))

    item = TrainTransform(config, SHAPES)(decode, Draws(0, 0))
    assert asked == [(100, 150)]
    assert (crop_of(item, 32) == 200).all()
    assert item.box == (0, 32, 0, 32)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_what_waits_for_the_device_is_no_larger_than_a_crop(height: int, width: int, seed: int) -> None:
    config = DataConfig(crop_px=64, rescale=(0.2, 3.0))
    item = TrainTransform(config, SHAPES)(lambda _: sample(height, width), Draws(seed, 0))
    assert item.window.untyped_storage().nbytes() <= 64 * 64 * 3


@settings(deadline=None, max_examples=100)
@given(*[st.integers(1, 60)] * 4, st.integers(0, 9))
def test_a_gpu_rescales_by_the_same_filter(height: int, width: int, other: int, another: int, seed: int) -> None:
    """It has none for bytes; floats are rounded where Pillow's filter on bytes rounds after each of its two passes."""
    image = torch.from_numpy(sample(height, width, seed).image)
    packed = image[None].permute(0, 3, 1, 2)
    made = _antialiased_in_floats(packed, (other, another))[0].permute(1, 2, 0)
    assert (made.int() - resized(image, (other, another)).int()).abs().max() <= 1


def test_bytes_normalised_on_the_device_are_floats_normalised_before() -> None:
    images = [sample(20, 30, seed).image for seed in range(3)]
    made = to_network_input(torch.from_numpy(np.stack(images)), torch.device("cpu"))
    assert torch.equal(made, torch.stack([normalise(torch.from_numpy(image).permute(2, 0, 1)) for image in images]))
    assert made.is_contiguous()


def test_normalising_and_back_is_off_by_one_value_at_most() -> None:
    image = torch.from_numpy(sample(20, 20).image).permute(2, 0, 1)
    assert (denormalise_to_unit(normalise(image)[None])[0] * 255 - image).abs().max() <= 1


def test_shapes_are_the_same_by_seed_and_differ_between_seeds_and_numbers() -> None:
    first, again = draw(3, 7, 64), draw(3, 7, 64)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    assert not np.array_equal(first.image, draw(3, 8, 64).image)
    assert not np.array_equal(first.image, draw(4, 7, 64).image)


@pytest.mark.parametrize("size_px", [32, 64, 96])
def test_tags_are_exactly_the_classes_of_the_mask(size_px: int) -> None:
    seen: set[str] = set()
    for index in range(60):
        drawn = draw(0, index, size_px)
        assert drawn.image.shape == (size_px, size_px, 3)
        shown = {SHAPES[value - 1] for value in np.unique(drawn.label) if value}
        assert shown == set(drawn.tags)
        assert 1 <= len(drawn.tags) <= 3
        seen |= shown
    assert seen == set(SHAPES)
