"""From samples to tensors: normalisation, training augmentation, batches.

Augmentation as published for AFA (section 4.1): random rescaling, horizontal flip, random crop with padding;
photometric distortion is optional. A crop comes with the box that holds picture and no padding. Padding is the mean
colour, which is 0 once normalised. Crops stay bytes until they are on the device.

The scale is drawn before the picture is decoded, so that one that is shrunk can be decoded at a smaller size; of the
rescaled picture only the crop is made, from whole pixels of the picture.

Shapes: H x W pixels, S the crop's side; boxes are y0 y1 x0 x1 within the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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


def to_pixels(image: Pixels) -> Tensor:
    """A picture uint8 [H, W, 3] as a tensor, without a copy if possible."""
    return torch.from_numpy(np.require(image, requirements="W"))  # torch takes nothing that is read-only


def normalise(image: Tensor) -> Tensor:
    """Network input float32 [..., 3, H, W] of bytes."""
    mean, std = _statistics(image.device)
    return (image.float() - mean) / std


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
        colour = torch.tensor(MEAN).round().to(torch.uint8)
        self._canvas = colour.expand(config.crop_px, config.crop_px, 3).contiguous()

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
        image = to_pixels(sample.image)
        size = rescaled_size(*sample.full_size)
        mirrored = rng.random() < config.flip_probability
        if config.photometric_distortion:  # which depends on the whole picture's mean
            image = _distorted(resized(image, size), rng)
        crop = torch.empty_like(self._canvas) if memory is None else memory
        box = self._crop(image, size, mirrored, rng, crop)
        return TrainItem(crop, tags_to_cls_label(sample.tags, self.classes), torch.tensor(box), sample.key)

    def _crop(
        self, image: Tensor, size: tuple[int, int], mirrored: bool, rng: np.random.Generator, crop: Tensor
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
        for margin in (np.s_[:y0], np.s_[y1:], np.s_[y0:y1, :x0], np.s_[y0:y1, x1:]):
            crop[margin] = self._canvas[margin]
        crop[y0:y1, x0:x1] = window.flip(1) if mirrored else window
        return box


def _rescaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, int(height * scale)), max(1, int(width * scale))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bytes [H, W, 3] -> [*size, 3], with a filter wide enough not to alias.

    Torch's antialiased filter on bytes is Pillow's, several times as fast.
    """
    if tuple(image.shape[:2]) == size:
        return image
    # Only a batch made of packed pixels is seen to be channels-last.
    packed = image.contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(packed, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _resized_window(image: Tensor, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
    """The window ``rows``, ``columns`` of the picture [H, W, 3] at a size, give or take half a pixel of the picture."""
    if tuple(image.shape[:2]) == size:
        return image[rows, columns]
    row_cut, column_cut = map(_whole_pixels, image.shape, size, (rows, columns))
    return resized(image[row_cut, column_cut], (rows.stop - rows.start, columns.stop - columns.start))


def _whole_pixels(side: int, target_side: int, window: slice) -> slice:
    """The pixels of a side that a window of the resized side is made of."""
    ratio = side / target_side
    start = min(round(window.start * ratio), side - 1)
    return slice(start, max(start + 1, round(window.stop * ratio)))


def _distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, each changed by at most a half, in random order."""
    picture = Image.fromarray(image.numpy())
    for index in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
        picture = enhance(picture).enhance(float(rng.uniform(0.5, 1.5)))
    return torch.from_numpy(np.array(picture))
