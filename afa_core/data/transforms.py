"""From samples to tensors: normalisation, training augmentation, batches.

Augmentation as published for AFA (section 4.1): random rescaling, horizontal flip, random crop with padding;
photometric distortion is optional. A crop comes with the box that holds picture and no padding. Padding is the mean
colour, which is 0 once normalised.

Shapes: H x W pixels, S the crop's side; boxes are y0 y1 x0 x1 within the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from afa_core.classes import tags_to_cls_label
from afa_core.config import DataConfig
from afa_core.data.sample import BadSample, Sample

# ImageNet statistics on the 0..255 scale.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

Pixels = NDArray[np.uint8]


def normalise(image: Pixels | Tensor) -> Tensor:
    """Network input of a picture uint8 [H, W, 3] -> float32 [3, H, W], or of a batch uint8 [B, 3, H, W]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1) if isinstance(image, np.ndarray) else image
    mean, std = _statistics(pixels)
    return (pixels.float() - mean) / std


def denormalise_to_unit(image: Tensor) -> Tensor:
    """Network input [B, 3, H, W] -> the picture in 0..1, its 0..255 values truncated to integers as published."""
    mean, std = _statistics(image)
    return (image * std + mean).to(torch.uint8).float() / 255


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(MEAN, device=image.device), torch.tensor(STD, device=image.device)
    return mean[:, None, None], std[:, None, None]


class TrainItem(NamedTuple):
    """A crop: image [3, S, S], cls_label [F], box [4] int64, and the sample's key."""

    image: Tensor
    cls_label: Tensor
    box: Tensor
    key: str


class TrainTransform:
    """Sample -> augmented crop; what is random comes from the generator that is handed in."""

    def __init__(self, config: DataConfig, classes: Sequence[str]) -> None:
        self.config, self.classes = config, tuple(classes)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> TrainItem:
        """Augment one sample.

        Raises:
            BadSample: it has no tags, so there is nothing to learn from it.
        """
        if sample.tags is None:
            raise BadSample("no_tags", "a training sample needs tags")
        config = self.config
        image = _rescaled(sample.image, float(rng.uniform(*config.rescale)))
        if rng.random() < config.flip_probability:
            image = image[:, ::-1]
        if config.photometric_distortion:
            image = _distorted(image, rng)
        crop, box = _crop(image, config.crop_px, rng)
        return TrainItem(normalise(crop), tags_to_cls_label(sample.tags, self.classes), torch.tensor(box), sample.key)


def _rescaled(image: Pixels, factor: float) -> Pixels:
    height, width = image.shape[:2]
    size = max(1, int(width * factor)), max(1, int(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def _distorted(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast and saturation, each changed by at most a half, in random order."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    for index in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[index]
        picture = enhance(picture).enhance(float(rng.uniform(0.5, 1.5)))
    return np.asarray(picture)


def _crop(image: Pixels, crop_px: int, rng: np.random.Generator) -> tuple[Pixels, list[int]]:
    """A random window of a large picture; a small one is set at a random place on a canvas of the mean colour."""
    crop = np.empty((crop_px, crop_px, 3), np.uint8)
    crop[:] = np.round(MEAN).astype(np.uint8)
    target, source, box = [], [], []
    for side in image.shape[:2]:
        length = min(side, crop_px)
        at, start = int(rng.integers(crop_px - length + 1)), int(rng.integers(side - length + 1))
        target.append(slice(at, at + length))
        source.append(slice(start, start + length))
        box += [at, at + length]
    crop[target[0], target[1]] = image[source[0], source[1]]
    return crop, box
