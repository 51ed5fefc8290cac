"""AFANet: one backbone, three heads.

Source: Ru et al., *Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
Transformers*, CVPR 2022, figure 2 and sections 3.1-3.2.

    class_logits  = W pool(f4)                      W a bias-free 1x1 convolution, pooling global maximum
    cam           = W f4                            the same W on every token          (equation 3)
    affinity      = sigmoid(MLP(S + S^T))           S the attention logits Q K^T       (equation 4)
    seg_logits    = decoder(f1, f2, f3, f4)

The MLP of equation 4 is one 1x1 convolution over the 2 n heads of the last two blocks, hence

    MLP(S + S^T) = M + M^T + b,   M = sum_h (w_h Q_h) K_h^T

which is one matrix product of [N, 2 n d] by [2 n d, N]; no heads x N x N tensor is ever formed.

Shapes: B images, F foreground classes, C = F + 1, N = h4 * w4 tokens of stage 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afa_core.affinity import PairAffinity
from afa_core.backbone import build_backbone, kernels
from afa_core.backbone.features import Backbone, BackboneOutput
from afa_core.config import ModelConfig
from afa_core.decoder import SegFormerDecoder


@dataclass(frozen=True)
class AFAOutput:
    """What one forward pass gives.

    Attributes:
        class_logits: [B, F].
        seg_logits: [B, C, h1, w1].
        affinity: [B, N, N] in 0..1, symmetric.
        backbone: the features and the queries and keys behind them.
    """

    class_logits: Tensor
    seg_logits: Tensor
    affinity: Tensor
    backbone: BackboneOutput


class TagLogits(NamedTuple):
    """What is left of a forward pass in the classification phase.

    Attributes:
        class_logits: [B, F].
        unused: 0, with a gradient of 0 for every parameter that had no part in it. Data-parallel training then needs no
            search for unused parameters.
    """

    class_logits: Tensor
    unused: Tensor


class AffinityHead(nn.Module):
    """The affinity, see the module header."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.head_weight = nn.Parameter(torch.empty(2 * heads))
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.kaiming_uniform_(self.head_weight[None], a=5**0.5)

    def forward(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """Queries and keys [B, n, N, d] of two blocks -> affinity [B, N, N]."""
        return self.pairs(queries, keys).all()

    def pairs(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> PairAffinity:
        """The affinity, not computed yet."""
        query = torch.cat(list(queries), dim=1).float() * self.head_weight[:, None, None]
        key = torch.cat(list(keys), dim=1).float()
        return PairAffinity(query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2), self.bias)


class AFANet(nn.Module):
    """Backbone, classifier, affinity head and decoder."""

    def __init__(self, config: ModelConfig, num_foreground: int) -> None:
        super().__init__()
        self.num_foreground = num_foreground
        self.pooling = config.pooling
        self.backbone: Backbone = build_backbone(
            config.backbone,
            strides=config.strides,
            drop_path_rate=config.drop_path_rate,
            timm_weights=config.pretrained == "timm",
        )
        channels = self.backbone.channels
        self.classifier = nn.Conv2d(channels[-1], num_foreground, 1, bias=False)
        self.affinity_head = AffinityHead(self.backbone.affinity_heads)
        self.decoder = SegFormerDecoder(channels, config.decoder_channels, num_foreground + 1, config.decoder_dropout)

    def forward(self, image: Tensor, *, tags_only: bool = False) -> AFAOutput | TagLogits:
        """Normalised image [B, 3, H, W] -> all heads, or that of the tags alone."""
        features = self.backbone(image)
        if tags_only:
            idle = [*self.affinity_head.parameters(), *self.decoder.parameters()]
            return TagLogits(self.classify(features), 0.0 * torch.stack([part.sum() for part in idle]).sum())
        return AFAOutput(
            class_logits=self.classify(features),
            seg_logits=self.segment(features),
            affinity=self.affinity_head(features.queries, features.keys),
            backbone=features,
        )

    def classify(self, features: BackboneOutput) -> Tensor:
        """Logits of the image-level tags, [B, F]."""
        pool = F.adaptive_max_pool2d if self.pooling == "max" else F.adaptive_avg_pool2d
        return self.classifier(pool(features.features[-1], 1)).flatten(1).float()

    def segment(self, features: BackboneOutput) -> Tensor:
        """Segmentation logits [B, C, h1, w1]."""
        return self.decoder(features.features).float()

    def activate(self, features: BackboneOutput) -> Tensor:
        """Class activation maps before rectification and normalisation, [B, F, h4, w4] (equation 3)."""
        return F.conv2d(features.features[-1], self.classifier.weight).float()


def build_model(config: ModelConfig, num_foreground: int) -> AFANet:
    """AFANet with its first weights: from scratch, from timm, or from a published checkpoint.

    From then on this process computes numbers of 32 bits as such on a GPU, too (``kernels.allow_tf32``).

    Args:
        config: what to build.
        num_foreground: F, the number of classes without background.

    Raises:
        InputError: unknown backbone, or ``config.pretrained`` is not a usable checkpoint.
    """
    from afa_core.published import import_published

    kernels.allow_tf32(False)
    model = AFANet(config, num_foreground)
    if config.checkpoint is not None:
        import_published(model, config.checkpoint)
    return model
