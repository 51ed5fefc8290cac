"""The built-in data: procedurally drawn pictures with exact masks, the same for the same seed everywhere.

Five classes that differ in outline *and* texture: ringed discs, chequered squares, striped triangles, dotted stars,
spoked rings. One to three of them lie, partly over each other, on a coloured, cluttered, noisy background. A texture
has its class's accent colour, the object under it a greyish one of its own. The texture is strong on one side and fades
towards the other, so that what tells a class apart covers only part of it: a class activation map finds that part, and
the rest is for refinement.

Coordinates of an object: u, v in about -1..1, rotated and scaled; r, t the polar form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from afa_core.classes import BACKGROUND, SHAPES

Field = NDArray[np.float64]

SMALLEST_VISIBLE_SHARE = 0.45  # of an object; one that is covered further is no tag and becomes background
NOISE = 7.0
TEXTURE_STRENGTH = 0.95  # how far the accent covers the object's own colour


@dataclass(frozen=True)
class ShapesPicture:
    """A drawn picture: image uint8 [H, W, 3], label uint8 [H, W] (0 background, 1..5), tags in class order."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    tags: tuple[str, ...]


def _outline_disc(u: Field, v: Field) -> NDArray[np.bool_]:
    return np.hypot(u, v) < 0.95


def _outline_square(u: Field, v: Field) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) < 0.8


def _outline_triangle(u: Field, v: Field) -> NDArray[np.bool_]:
    return (v < 0.6) & (v > -1.1 + np.sqrt(3) * abs(u))


def _outline_star(u: Field, v: Field) -> NDArray[np.bool_]:
    return np.hypot(u, v) < 0.75 + 0.33 * np.cos(5 * np.arctan2(u, v))


def _outline_ring(u: Field, v: Field) -> NDArray[np.bool_]:
    radius = np.hypot(u, v)
    return (radius > 0.45) & (radius < 1.0)


def _texture_disc(u: Field, v: Field) -> Field:
    return np.cos(16 * np.hypot(u, v))


def _texture_square(u: Field, v: Field) -> Field:
    return np.sign(np.sin(10 * u) * np.sin(10 * v))


def _texture_triangle(u: Field, v: Field) -> Field:
    return np.sign(np.sin(15 * v))


def _texture_star(u: Field, v: Field) -> Field:
    return np.where(np.cos(13 * u) * np.cos(13 * v) > 0.1, 1.0, -1.0)


def _texture_ring(u: Field, v: Field) -> Field:
    return np.sign(np.sin(12 * np.arctan2(u, v)))


_OUTLINES: tuple[Callable[[Field, Field], NDArray[np.bool_]], ...] = (
    _outline_disc, _outline_square, _outline_triangle, _outline_star, _outline_ring,
)  # fmt: skip
_TEXTURES: tuple[Callable[[Field, Field], Field], ...] = (
    _texture_disc, _texture_square, _texture_triangle, _texture_star, _texture_ring,
)  # fmt: skip
# Colours of the textures.
_ACCENTS = np.array([[235, 40, 40], [40, 60, 235], [30, 220, 60], [240, 235, 50], [235, 50, 230]], dtype=np.float64)


def draw(seed: int, index: int, size_px: int = 96) -> ShapesPicture:
    """Picture ``index`` of the data set ``seed``, ``size_px`` wide and high."""
    rng = np.random.default_rng([seed, index])
    rows, columns = np.mgrid[0:size_px, 0:size_px].astype(np.float64)
    background = _dull_colour(rng)
    image = _background(rng, rows, columns, size_px, background)
    label = np.zeros((size_px, size_px), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        kind = int(rng.integers(len(SHAPES)))
        radius = rng.uniform(0.2, 0.32) * size_px
        top, left = rng.uniform(radius * 0.9, size_px - radius * 0.9, 2)
        angle = rng.uniform(0, 2 * np.pi)
        y, x = (rows - top) / radius, (columns - left) / radius
        u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        inside = _OUTLINES[kind](u, v)
        colour = _colour_apart_from(background, rng)
        # The texture fades from one side of the object to the other.
        strength = TEXTURE_STRENGTH / (1 + np.exp(4 * (u - 0.1))) * (0.5 + 0.5 * _TEXTURES[kind](u, v))
        painted = colour + strength[..., None] * (_ACCENTS[kind] - colour)
        if not _covers_too_much(label, inside):
            image[inside], label[inside] = painted[inside], kind + 1
    image += rng.normal(0, NOISE, image.shape)
    present = np.unique(label)
    tags = tuple(SHAPES[value - 1] for value in present if value != BACKGROUND)
    return ShapesPicture(np.clip(image, 0, 255).astype(np.uint8), label, tags)


def _background(rng: np.random.Generator, rows: Field, columns: Field, size_px: int, colour: Field) -> Field:
    """A slope of colour under soft blobs and thin lines that belong to no class."""
    slope = (rows * rng.uniform(-1, 1) + columns * rng.uniform(-1, 1)) / size_px
    image = colour + 25 * slope[..., None] * rng.uniform(-1, 1, 3)
    for _ in range(int(rng.integers(2, 6))):
        top, left = rng.uniform(0, size_px, 2)
        spread = rng.uniform(0.05, 0.15) * size_px
        blob = np.exp(-((rows - top) ** 2 + (columns - left) ** 2) / (2 * spread**2))
        image += blob[..., None] * rng.uniform(-35, 35, 3)
    for _ in range(int(rng.integers(1, 5))):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0, size_px)
        distance = abs(rows * np.cos(angle) + columns * np.sin(angle) - offset)
        image[distance < 0.8] += rng.uniform(-60, 60)
    return image


def _dull_colour(rng: np.random.Generator) -> Field:
    """A greyish colour."""
    colour: Field = rng.uniform(50, 205) + rng.uniform(-40, 40, 3)
    return colour


def _colour_apart_from(other: Field, rng: np.random.Generator) -> Field:
    """A greyish colour that can be told from another one."""
    while True:
        colour = _dull_colour(rng)
        if abs(colour - other).max() > 60:
            return colour


def _covers_too_much(label: NDArray[np.uint8], inside: NDArray[np.bool_]) -> bool:
    """Whether painting ``inside`` would leave a class that is there with hardly a pixel."""
    for value in np.unique(label[inside]):
        if value != BACKGROUND and (label[~inside] == value).sum() < SMALLEST_VISIBLE_SHARE * (label == value).sum():
            return True
    return False
