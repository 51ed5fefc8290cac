"""From samples to tensors: normalisation and training augmentation.

Augmentation as published for AFA (section 4.1): random rescaling, horizontal flip, random crop with padding;
photometric distortion is optional. A crop comes with the box that holds picture and no padding. Padding is the mean
colour, which is 0 once normalised.

``TrainTransform`` draws and cuts, where the pictures are read; ``make_crops`` rescales, mirrors and pads on the device
what was cut. All of it stays bytes until then. The scale is drawn before the picture is decoded, so that one that is
shrunk can be decoded at a smaller size; of the rescaled picture only the crop is made, from whole pixels of the
picture.

Shapes: H x W pixels, S the crop's side; boxes are y0 y1 x0 x1 within the crop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from random import Random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from afa_core.classes import tags_to_cls_label
from afa_core.config import DataConfig
from afa_core.data.draws import Draws
from afa_core.data.sample import BadSample, NeededSize, Sample

# ImageNet statistics on the 0..255 scale.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Pixels = NDArray[np.uint8]
# The sample, decoded at no less than the size that is needed.
Decode = Callable[[NeededSize], Sample]


def to_pixels(image: Pixels) -> Tensor:
    """A picture uint8 [H, W, 3] as a tensor, without a copy if possible."""
    return torch.from_numpy(image if image.flags.writeable else image.copy())  # torch takes nothing that is read-only


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
    """What a crop is made of.

    Attributes:
        window: uint8 [h, w, 3], pixels of the picture; no more of them than a crop has.
        mirrored: whether the crop shows the window's mirror image.
        box: y0 y1 x0 x1, where in the crop the window goes, at whatever size that is; the rest is padding.
        cls_label: [F] multi-hot.
        key: of the sample.
    """

    window: Tensor
    mirrored: bool
    box: tuple[int, int, int, int]
    cls_label: Tensor
    key: str


class TrainTransform:
    """Sample -> what its augmented crop is made of; what is random comes from the draws that are handed in."""

    def __init__(self, config: DataConfig, classes: Sequence[str]) -> None:
        self.config, self.classes = config, tuple(classes)

    def __call__(self, decode: Decode, draws: Draws) -> TrainItem:
        """Draw the augmentation of one sample, and cut out what it shows.

        Raises:
            BadSample: it cannot be decoded, or has no tags, so that there is nothing to learn from it.
        """
        config = self.config
        rescaled_size = partial(_rescaled_size, scale=draws.uniform(*config.rescale))
        sample = decode(rescaled_size)
        if sample.tags is None:
            raise BadSample("no_tags", "a training sample needs tags")
        image = sample.image
        size = rescaled_size(*sample.full_size)
        mirrored = draws.random() < config.flip_probability
        if config.photometric_distortion:  # which depends on the whole picture's mean
            image = _distorted(resized(to_pixels(image), size).numpy(), draws.generator())
        (rows, top), (columns, left) = (self._draw(side, draws) for side in size)
        if mirrored:
            columns = slice(size[1] - columns.stop, size[1] - columns.start)
        window = self._cut(image, size, rows, columns)
        box = (top.start, top.stop, left.start, left.stop)
        return TrainItem(window, mirrored, box, tags_to_cls_label(sample.tags, self.classes), sample.key)

    def _draw(self, side: int, draws: Draws) -> tuple[slice, slice]:
        """What the crop shows of a side at random, and where: a small picture is set at a random place of the crop."""
        length = min(side, self.config.crop_px)
        at, start = draws.below(self.config.crop_px - length + 1), draws.below(side - length + 1)
        return slice(start, start + length), slice(at, at + length)

    def _cut(self, image: Pixels, size: tuple[int, int], rows: slice, columns: slice) -> Tensor:
        """The picture's pixels under a window of it at a size; shrunk already where that makes less of them."""
        row_cut, column_cut = map(_whole_pixels, image.shape, size, (rows, columns))
        window, most = image[row_cut, column_cut], 3 * self.config.crop_px**2
        if window.size > most:
            return resized(to_pixels(window), (rows.stop - rows.start, columns.stop - columns.start))
        # The part of a large picture would keep all of it in memory.
        return to_pixels(window if image.size <= most else window.copy())


def make_crops(
    windows: Sequence[Tensor], mirrored: Sequence[bool], boxes: Tensor, crop_px: int, device: torch.device
) -> Tensor:
    """Crops uint8 [B, S, S, 3] on the device, of windows uint8 [h, w, 3], with their boxes [B, 4]."""
    canvas = _canvas(crop_px, device)
    crops = torch.empty(len(windows), *canvas.shape, dtype=torch.uint8, device=device)
    for crop, window, flip, (y0, y1, x0, x1) in zip(crops, windows, mirrored, boxes.tolist(), strict=True):
        for margin in (np.s_[:y0], np.s_[y1:], np.s_[y0:y1, :x0], np.s_[y0:y1, x1:]):
            crop[margin] = canvas[margin]
        pixels = resized(window.to(device, non_blocking=True), (y1 - y0, x1 - x0))
        crop[y0:y1, x0:x1] = pixels.flip(1) if flip else pixels
    return crops


@lru_cache
def _canvas(crop_px: int, device: torch.device) -> Tensor:
    colour = torch.tensor(MEAN, device=device).round().to(torch.uint8)
    return colour.repeat(crop_px, crop_px, 1)


def _rescaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, int(height * scale)), max(1, int(width * scale))


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bytes [H, W, 3] -> [*size, 3], with a filter wide enough not to alias.

    On the CPU torch's antialiased filter on bytes is Pillow's, several times as fast; a GPU has it for floats only.
    """
    if tuple(image.shape[:2]) == size:
        return image
    # Only a batch made of packed pixels is seen to be channels-last.
    packed = image.contiguous()[None].permute(0, 3, 1, 2)
    filtered = _antialiased if image.device.type == "cpu" else _antialiased_in_floats
    return filtered(packed, size)[0].permute(1, 2, 0)


def _antialiased(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def _antialiased_in_floats(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    return _antialiased(pixels.float(), size).round().to(torch.uint8)


def _whole_pixels(side: int, target_side: int, window: slice) -> slice:
    """The pixels of a side that a window of the resized side is made of."""
    ratio = side / target_side
    start = min(round(window.start * ratio), side - 1)
    return slice(start, max(start + 1, round(window.stop * ratio)))


def _distorted(image: Pixels, rng: Random) -> Pixels:
    """Brightness, contrast and saturation, each changed by at most a half, in random order."""
    picture = Image.fromarray(image)
    for index in rng.sample(range(3), 3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
        picture = enhance(picture).enhance(rng.uniform(0.5, 1.5))
    return np.array(picture)
