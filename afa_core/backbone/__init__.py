"""Backbones behind one interface: ``build_backbone(name)`` gives a pyramid and the last blocks' Q and K."""

from __future__ import annotations

from afa_core.backbone.features import Backbone, BackboneOutput
from afa_core.backbone.mit import SIZES, MixTransformer
from afa_core.errors import InputError

__all__ = ["Backbone", "BackboneOutput", "build_backbone"]


def build_backbone(
    name: str,
    *,
    strides: tuple[int, int, int, int] = (4, 2, 2, 1),
    drop_path_rate: float = 0.1,
    timm_weights: bool = False,
) -> Backbone:
    """Backbone by name, from scratch or with timm's weights.

    Args:
        name: ``mit_b0`` .. ``mit_b5``, ``pvt_v2_b0`` .. ``pvt_v2_b5``, or a plain ViT of timm
            (``vit_*``, ``deit_*``, ``deit3_*``, the DINO families).
        strides: of the four patch embeddings; MiT and PVTv2 only.
        drop_path_rate: stochastic depth of the last block, 0 at the first.
        timm_weights: load timm's pre-trained weights (not for MiT, which timm does not have).

    Raises:
        InputError: no such backbone, or its weights cannot be had.
    """
    if name in SIZES:
        if timm_weights:
            raise InputError(f"timm has no weights for {name}: give the path of a published checkpoint")
        return MixTransformer(SIZES[name], strides, drop_path_rate)
    # timm and torchvision behind it take 120 MiB and seconds to import, in every worker: only where they are used.
    from afa_core.backbone.timm_backbone import build_timm

    return build_timm(name, strides=strides, drop_path_rate=drop_path_rate, pretrained=timm_weights)
