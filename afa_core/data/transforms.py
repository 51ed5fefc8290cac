"""From samples to tensors: normalisation, training augmentation, batches.

Augmentation as published for AFA (section 4.1): random rescaling, horizontal flip, random crop with padding;
photometric distortion is optional. A crop comes with the box that holds picture and no padding. Padding is the mean
colour, which is 0 once normalised. Crops stay bytes until they are on the device.

The scale is drawn before the picture is decoded, so that one that is shrunk can be decoded at a smaller size; of the
rescaled picture only the crop is made.

Shapes: H x W pixels, S the crop's side; boxes are y0 y1 x0 x1 within the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from afa_core.classes import tags_to_cls_label
from afa_core.config import DataConfig
from afa_core.data.sample import BadSample, NeededSize, Sample

# ImageNet statistics on the 0..255 scale.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Pixels = NDArray[np.uint8]
# The sample, decoded at no less than the size that is needed.
Decode = Callable[[NeededSize], Sample]


def normalise(image: Pixels | Tensor) -> Tensor:
    """Network input of a picture uint8 [H, W, 3] -> float32 [3, H, W], or of a batch uint8 [B, 3, H, W]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
    mean, std = _statistics(pixels.device)
    return (pixels.float() - mean) / std


def to_network_input(pixels: Tensor, device: torch.device) -> Tensor:
    """Pictures uint8 [B, H, W, 3] -> network input [B, 3, H, W] on the device: bytes travel, floats are made there."""
    return normalise(pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous())


def denormalise_to_unit(image: Tensor) -> Tensor:
    """Network input [B, 3, H, W] -> the picture in 0..1, its 0..255 values truncated to integers as published."""
    mean, std = _statistics(image.device)
    return (image * std + mean).to(torch.uint8).float() / 255


@lru_cache  # else a GPU would be waited for each time
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    return mean[:, None, None], std[:, None, None]


class TrainItem(NamedTuple):
    """A crop: image uint8 [S, S, 3], cls_label [F], box [4] int64, and the sample's key."""

    image: Tensor
    cls_label: Tensor
    box: Tensor
    key: str


class TrainTransform:
    """Sample -> augmented crop; what is random comes from the generator that is handed in."""

    def __init__(self, config: DataConfig, classes: Sequence[str]) -> None:
        self.config, self.classes = config, tuple(classes)
        self._canvas = np.empty((config.crop_px, config.crop_px, 3), np.uint8)
        self._canvas[:] = np.round(MEAN).astype(np.uint8)

    def __call__(self, decode: Decode, rng: np.random.Generator, memory: Tensor | None = None) -> TrainItem:
        """Augment one sample; the crop is written into the memory uint8 [S, S, 3], if one is given.

        Raises:
            BadSample: it cannot be decoded, or has no tags, so that there is nothing to learn from it.
        """
        config = self.config
        rescaled_size = partial(_rescaled_size, scale=float(rng.uniform(*config.rescale)))
        sample = decode(rescaled_size)
        if sample.tags is None:
            raise BadSample("no_tags", "a training sample needs tags")
        image, size = sample.image, rescaled_size(*sample.full_size)
        mirrored = rng.random() < config.flip_probability
        if config.photometric_distortion:  # which depends on the whole picture's mean
            image = _distorted(_resized_window(image, size, slice(0, size[0]), slice(0, size[1])), rng)
        crop = torch.empty(self._canvas.shape, dtype=torch.uint8) if memory is None else memory
        box = self._crop(image, size, mirrored, rng, crop.numpy())
        return TrainItem(crop, tags_to_cls_label(sample.tags, self.classes), torch.tensor(box), sample.key)

    def _crop(
        self, image: Pixels, size: tuple[int, int], mirrored: bool, rng: np.random.Generator, crop: Pixels
    ) -> list[int]:
        """A random window of the picture at a size; a small one is set at a random place on a canvas. Gives its box."""
        crop_px = self.config.crop_px
        source, box = [], []
        for side in size:
            length = min(side, crop_px)
            at, start = int(rng.integers(crop_px - length + 1)), int(rng.integers(side - length + 1))
            source.append(slice(start, start + length))
            box += [at, at + length]
        (rows, columns), (y0, y1, x0, x1) = source, box
        if mirrored:
            columns = slice(size[1] - columns.stop, size[1] - columns.start)
        window = _resized_window(image, size, rows, columns)
        if mirrored:  # numpy is 20 times as slow at it; torch takes nothing that is read-only
            window = torch.from_numpy(np.require(window, requirements="W")).flip(1).numpy()
        for margin in (np.s_[:y0], np.s_[y1:], np.s_[y0:y1, :x0], np.s_[y0:y1, x1:]):
            crop[margin] = self._canvas[margin]
        crop[y0:y1, x0:x1] = window
        return box


def _rescaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, int(height * scale)), max(1, int(width * scale))


def _resized_window(image: Pixels, size: tuple[int, int], rows: slice, columns: slice) -> Pixels:
    """The window ``rows``, ``columns`` of the picture [H, W, 3] as it would be at a size, without making the rest."""
    if image.shape[:2] == size:
        return image[rows, columns]
    (top, bottom, row_cut), (left, right, column_cut) = map(_extent, image.shape, size, (rows, columns))
    part = Image.fromarray(image[row_cut, column_cut])
    target = columns.stop - columns.start, rows.stop - rows.start
    return np.asarray(part.resize(target, Image.Resampling.BILINEAR, box=(left, top, right, bottom)))


def _extent(side: int, target_side: int, window: slice) -> tuple[float, float, slice]:
    """Where a window of a resized side begins and ends in a cut of the side itself that holds all it depends on."""
    ratio = side / target_side
    start, stop = window.start * ratio, window.stop * ratio
    reach = max(1.0, ratio) + 1.0  # of the filter, and one for rounding
    first, last = max(0, floor(start - reach)), min(side, ceil(stop + reach))
    return start - first, min(stop - first, last - first), slice(first, last)


def _distorted(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast and saturation, each changed by at most a half, in random order."""
    picture = Image.fromarray(image)
    for index in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
        picture = enhance(picture).enhance(float(rng.uniform(0.5, 1.5)))
    return np.asarray(picture)
