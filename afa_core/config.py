"""Configuration of the science, one frozen dataclass a concept.

Every threshold, weight and phase length of the method stands here and nowhere else. The numbers are
AFA's published ones (CVPR 2022, section 4.1) unless a comment says otherwise. Ranges are declared as
``annotated_types`` metadata; the pipelines validate a whole experiment against them in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, Le, MinLen

STRICT: dict[str, Any] = {"extra": "forbid"}

Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
# Factor on a picture's size: memory grows with its fourth power, as attention does with the number of tokens.
Scale = Annotated[float, Interval(ge=0.1, le=4)]
CountOrZero = Annotated[int, Ge(0)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is built: backbone, heads and where the first weights come from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    backbone: str = "mit_b1"
    # Path of a published SegFormer or AFA checkpoint, or "timm" for timm's own weights; None: from scratch.
    pretrained: str | None = None
    # Patch-embedding strides of the four stages: the last one is 1, so stage 4 stays at stride 16.
    strides: tuple[Count, Count, Count, Count] = (4, 2, 2, 1)
    decoder_channels: Count = 256
    pooling: Literal["max", "average"] = "max"
    drop_path_rate: Share = 0.1
    decoder_dropout: Share = 0.1

    @property
    def checkpoint(self) -> str | None:
        """Path of the published checkpoint that ``pretrained`` names, if it does."""
        return None if self.pretrained == "timm" else self.pretrained


@dataclass(frozen=True, kw_only=True)
class CamConfig:
    """From class activation maps to labels: scales, thresholds and the random walk."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    scales: Annotated[tuple[Scale, ...], MinLen(1)] = (1.0, 0.5, 1.5)
    # Background score of a label map without ignored pixels.
    background_score: Share = 0.45
    # Between the two a pixel is neither background nor foreground: it is ignored.
    background_score_low: Share = 0.35
    background_score_high: Share = 0.55
    # Tokens interact with those at most so many rows and columns away.
    affinity_radius: Count = 8
    propagation_power: Positive = 2.0
    propagation_iterations: Count = 1

    def __post_init__(self) -> None:
        if self.background_score_low > self.background_score_high:
            raise ValueError("background_score_low must not exceed background_score_high")


@dataclass(frozen=True, kw_only=True)
class ParConfig:
    """Pixel-adaptive refinement."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    dilations: Annotated[tuple[Count, ...], MinLen(1)] = (1, 2, 4, 8, 12, 24)
    iterations: Count = 10
    colour_bandwidth: Positive = 0.3  # w1
    position_weight: NonNegative = 0.01  # w2
    # Refinement runs on pictures and maps shrunk by this factor.
    shrink_factor: Count = 2


@dataclass(frozen=True, kw_only=True)
class CrfConfig:
    """Dense CRF; the values are those AFA was published with at test time."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    iterations: Count = 10
    # Smoothness kernel: standard deviation in pixels, and weight.
    position_xy_px: Positive = 3.0
    position_weight: NonNegative = 3.0
    # Appearance kernel: standard deviations in pixels and in colour levels (0..255), and weight.
    bilateral_xy_px: Positive = 64.0
    bilateral_rgb: Positive = 5.0
    bilateral_weight: NonNegative = 4.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Loss weights and the phase plan, in optimiser steps."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    segmentation_weight: NonNegative = 0.1
    affinity_weight: NonNegative = 0.1
    # Before this step only the classification loss counts.
    classification_steps: CountOrZero = 2_000
    # From this step on the segmentation labels come from the propagated CAM, before from the refined CAM.
    affinity_label_step: CountOrZero = 6_000

    def __post_init__(self) -> None:
        if self.affinity_label_step < self.classification_steps:
            raise ValueError("affinity_label_step must not be smaller than classification_steps")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and polynomial decay."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    lr: Positive = 6e-5
    head_lr_factor: Positive = 10.0
    weight_decay: NonNegative = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    total_steps: Count = 20_000
    warmup_steps: CountOrZero = 1_500
    warmup_ratio: Share = 1e-6
    power: NonNegative = 1.0
    # Backbone norms: "auto" freezes them as published when the backbone starts from pre-trained weights.
    backbone_norms: Literal["auto", "frozen", "trained"] = "auto"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How training reads and augments samples."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    crop_px: Annotated[int, Interval(ge=32, le=4096)] = 512
    rescale: tuple[Positive, Positive] = (0.5, 2.0)
    flip_probability: Share = 0.5
    photometric_distortion: bool = False
    # Whether every sample comes exactly once an epoch, or shards are drawn with replacement.
    sampling: Literal["exact", "resampled"] = "exact"
    # Samples that are shuffled among each other; every place in the batch reads from another part of the data.
    shuffle_block: Count = 512
    # Threads that read and decode ahead of the training loop.
    loader_workers: CountOrZero = 2
    # Pictures with more pixels are refused: a small file can unpack to gigabytes.
    max_megapixels: Positive = 100.0
    # Shards of an object store that a machine keeps for its workers; the ones not used for longest go first.
    cache_gib: Positive = 50.0
    # Share of samples that may be unusable before training stops.
    max_bad_share: Annotated[float, Ge(0), Le(1)] = 0.01

    def __post_init__(self) -> None:
        if self.rescale[0] > self.rescale[1]:
            raise ValueError("rescale must be (smallest, largest)")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How finished models label pictures."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    # Which tags a picture is labelled with: given ones, those the classifier is sure of, or given ones where there are.
    tags: Literal["auto", "given", "predicted"] = "auto"
    # A class counts as predicted from this probability on.
    tag_probability: Share = 0.5
    # What decides: the class activation maps, the segmentation head, or both where they agree (else ignored).
    head: Literal["cam", "segmentation", "agreement"] = "cam"
    # What is done to the class activation maps.
    refine: Literal["none", "par", "affinity", "affinity+par"] = "affinity+par"
    # None: those of cam.scales.
    scales: Annotated[tuple[Scale, ...], MinLen(1)] | None = None
    # Dense CRF at the end.
    crf: bool = False
    # None: cam.background_score.
    background_score: Share | None = None
    # Leave pixels between the low and the high background score ignored (255) instead of deciding at one score.
    ignore_band: bool = False
    # Larger pictures are labelled at this long side and the mask is brought back.
    max_side_px: Annotated[int, Ge(64)] = 512
    max_megapixels: Positive = 100.0
    # Larger files are not even fetched.
    max_file_mb: Positive = 256.0
