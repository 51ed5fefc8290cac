"""Mix Transformer (MiT b0..b5), the hierarchical encoder of SegFormer.

Source: Xie et al., *SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers*,
NeurIPS 2021, section 3.1 and table 6. Written from the paper:

    patch merging   x -> LN(conv_k(x)), kernel 7 then 3, overlapping
    attention       Attention(Q, K, V) = softmax(Q K^T / sqrt(d)) V, with K and V taken from a sequence
                    shortened by a strided convolution (equation 2), ratios 8, 4, 2, 1
    Mix-FFN         x + linear(GELU(depthwise3x3(linear(x))))   (equation 3)

As in AFA (section 3.2) the last patch merging has stride 1, so that stage 4 keeps stride 16; the strides
are configurable. Layer-norm epsilons are 1e-6 in and behind the blocks, 1e-5 elsewhere.

Shapes: B images, N = h * w tokens, c channels of a stage, n heads of d = c / n channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afa_core.backbone import kernels
from afa_core.backbone.features import BackboneOutput
from afa_core.backbone.stochastic_depth import StochasticDepth

HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)
EXPANSION = 4
# Hidden activations of a strip of the feed-forward network: 6 MiB stay in the cache.
STRIP_ACTIVATIONS = 3 * 2**19


@dataclass(frozen=True)
class MitSize:
    """Channels and number of blocks of the four stages (SegFormer, table 6)."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]


SIZES = {
    # Not published: small enough to learn from scratch on two cores, for the demo and the tests.
    "mit_tiny": MitSize((32, 64, 80, 128), (1, 1, 2, 2)),
    "mit_b0": MitSize((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": MitSize((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": MitSize((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": MitSize((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": MitSize((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": MitSize((64, 128, 320, 512), (3, 6, 40, 3)),
}


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, N, c] -> [B, c, h, w], channels last: the same memory, also for a single image."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def map_to_tokens(feature: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, N, c]."""
    return feature.flatten(2).transpose(1, 2)


class PatchMerging(nn.Module):
    """Overlapping patch embedding: a strided convolution and a layer norm over channels."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, feature: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, c_in, H, W] -> tokens [B, N, c] and their grid (h, w)."""
        feature = self.projection(feature)
        return self.norm(map_to_tokens(feature)), (feature.shape[2], feature.shape[3])


class SpatialReductionAttention(nn.Module):
    """Multi-head self-attention whose keys and values come from a grid shrunk ``reduction`` times."""

    def __init__(self, channels: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.output = nn.Linear(channels, channels)
        self.reduction: nn.Conv2d | None = None
        if reduction > 1:
            self.reduction = nn.Conv2d(channels, channels, reduction, reduction)
            self.reduction_norm = nn.LayerNorm(channels, eps=1e-5)

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Attended tokens [B, N, c] with the queries [B, n, N, d] and keys [B, n, M, d] that made them."""
        source = tokens
        if self.reduction is not None:
            source = self.reduction_norm(map_to_tokens(self.reduction(tokens_to_map(tokens, grid))))
        query = _apply(self.query, tokens, fast).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = _apply(self.key_value, source, fast).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = kernels.attend(query, key, value, fast=fast)
        return _apply(self.output, attended.transpose(1, 2).flatten(2), fast), query, key


class MixFeedForward(nn.Module):
    """Feed-forward network with a depth-wise 3x3 convolution in place of a position code (equation 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        self.expand = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.contract = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor, norm: nn.LayerNorm, grid: tuple[int, int], *, fast: bool) -> Tensor:
        """Tokens [B, N, c], which are normalised first, -> [B, N, c]."""
        if kernels.works_in_pieces(tokens, fast=fast):
            strips = [strip for image in tokens.unflatten(1, grid).split(1) for strip in self._strips(image, norm)]
            return torch.cat(strips).view_as(tokens)
        return self._mix(norm(tokens).unflatten(1, grid), 0, 0, fast).flatten(1, 2)

    def _strips(self, image: Tensor, norm: nn.LayerNorm) -> Iterator[Tensor]:
        """One image [1, h, w, c] some rows at a time, [r * w, c], each made with a row more above and below."""
        height, width = image.shape[1:3]
        rows = max(1, STRIP_ACTIVATIONS // (width * self.expand.out_features))
        for first, last in kernels.even_cuts(height, rows):
            above, below = min(first, 1), min(height - last, 1)
            strip = image[:, first - above : last + below]
            mix = partial(self._mix_normalised, norm, above=above, below=below)
            yield kernels.recomputed(mix, strip, *norm.parameters(), *self.parameters()).flatten(0, 2)

    def _mix_normalised(self, norm: nn.LayerNorm, rows: Tensor, above: int, below: int) -> Tensor:
        return self._mix(norm(rows), above, below, True)

    def _mix(self, rows: Tensor, above: int, below: int, fast: bool) -> Tensor:
        """[B, r, w, c] without so many rows above and below, which only the convolution looks at."""
        hidden = self.depthwise(_apply(self.expand, rows, fast).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = hidden[:, above : hidden.shape[1] - below]
        return _apply(self.contract, F.gelu(hidden), fast)


class Block(nn.Module):
    """Attention and Mix-FFN, each behind a layer norm and inside a residual with stochastic depth."""

    def __init__(self, channels: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels, eps=1e-6)
        self.attention = SpatialReductionAttention(channels, heads, reduction)
        self.feed_forward_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feed_forward = MixFeedForward(channels)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, tokens: Tensor, grid: tuple[int, int], *, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, N, c] with the queries and keys of the attention."""
        attended, query, key = self.attention(self.attention_norm(tokens), grid, fast=fast)
        tokens = tokens + self.drop_path(attended)
        tokens = tokens + self.drop_path(self.feed_forward(tokens, self.feed_forward_norm, grid, fast=fast))
        return tokens, query, key


class Stage(nn.Module):
    """Patch merging, blocks, final norm."""

    def __init__(self, merging: PatchMerging, blocks: list[Block], channels: int) -> None:
        super().__init__()
        self.merging = merging
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, feature: Tensor, *, fast: bool, checkpointed: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The stage's map [B, c, h, w] and the (queries, keys) of its last two blocks."""
        tokens, grid = self.merging(feature)
        queries_keys: list[tuple[Tensor, Tensor]] = []
        for block in self.blocks:
            if checkpointed:
                tokens, query, key = checkpoint(block, tokens, grid, fast=fast, use_reentrant=False)
            else:
                tokens, query, key = block(tokens, grid, fast=fast)
            queries_keys = [*queries_keys[-1:], (query, key)]
        feature = tokens_to_map(self.norm(tokens), grid)
        return feature if fast else feature.contiguous(), queries_keys


class MixTransformer(nn.Module):
    """MiT encoder: four stages of growing width and shrinking grid."""

    def __init__(
        self, size: MitSize, strides: tuple[int, int, int, int] = (4, 2, 2, 1), drop_path_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.channels = size.channels
        self.affinity_heads = HEADS[-1]
        # Blocks keep their input alone for the gradient and run again in the backward pass.
        self.gradient_checkpointing = False
        # Stochastic depth grows linearly over all blocks of the network.
        blocks_in_all = sum(size.depths)
        rates = iter(drop_path_rate * index / (blocks_in_all - 1) for index in range(blocks_in_all))
        stages = []
        for index, (channels, depth) in enumerate(zip(size.channels, size.depths, strict=True)):
            in_channels = 3 if index == 0 else size.channels[index - 1]
            merging = PatchMerging(in_channels, channels, 7 if index == 0 else 3, strides[index])
            blocks = [Block(channels, HEADS[index], REDUCTIONS[index], next(rates)) for _ in range(depth)]
            stages.append(Stage(merging, blocks, channels))
        self.stages = nn.ModuleList(stages)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> BackboneOutput:
        """Normalised image [B, 3, H, W] -> pyramid at strides 4, 8, 16, 16 and the last blocks' Q and K."""
        fast = kernels.is_large(image.shape[2:])
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
        features = []
        queries_keys: list[tuple[Tensor, Tensor]] = []
        feature = image
        for stage in self.stages:
            feature, queries_keys = stage(feature, fast=fast, checkpointed=checkpointed)
            features.append(feature)
        (query_a, key_a), (query_b, key_b) = queries_keys
        return BackboneOutput(
            features=(features[0], features[1], features[2], features[3]),
            queries=(query_a, query_b),
            keys=(key_a, key_b),
        )


def _apply(layer: nn.Linear, tokens: Tensor, fast: bool) -> Tensor:
    return kernels.linear(tokens, layer.weight, layer.bias, fast=fast)


def _initialise(module: nn.Module) -> None:
    """Weights before any training: small normal linear layers, fan-out normal convolutions.

    Variance-preserving linear layers look like the better start at 32 to 256 channels and are not: from scratch nothing
    was learned from them (docs/experiments.md).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
