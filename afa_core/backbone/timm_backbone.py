"""timm's PVTv2 and plain ViTs, brought to the interface of ``features.py``.

PVTv2 (Wang et al., 2022) is the near twin of MiT with permissively licensed ImageNet weights; its last patch
embedding is set to stride 1, as in AFA. A plain ViT (ViT, DeiT III, DINO v1-v3) has one grid: its pyramid is
the output of four blocks a quarter of the depth apart.

timm returns no pre-softmax attention. The inputs of the last two attention modules are recorded while they
run, and their own projections give Q and K once more: two small matrix products instead of a copy of timm's
attention.

Shapes: B images, n heads of d channels, N = h * w tokens without prefix (class, register) tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from afa_core.backbone.features import BackboneOutput
from afa_core.backbone.torchvision_ops import declare_missing_operators
from afa_core.errors import InputError

declare_missing_operators()  # before timm is imported

import timm  # noqa: E402
from timm.layers import apply_rot_embed_cat  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.pvt_v2 import PyramidVisionTransformerV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

Call = tuple[Tensor, Tensor | None]  # what an attention module was called with: tokens and rotary code


@contextmanager
def _recorded_calls(modules: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """The inputs of ``modules``, in the order in which they run inside the block."""
    calls: list[Call] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments[0], keywords.get("rope")))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class PyramidBackbone(nn.Module):
    """PVTv2 with strides 4, 2, 2, 1."""

    def __init__(self, network: PyramidVisionTransformerV2, strides: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.network = network
        embeddings = [network.patch_embed, *(stage.downsample for stage in list(network.stages)[1:])]
        for embedding, stride in zip(embeddings, strides, strict=True):
            embedding.proj.stride = (stride, stride)
        widths = [int(info["num_chs"]) for info in network.feature_info]
        self.channels = (widths[0], widths[1], widths[2], widths[3])
        self._attentions = [block.attn for block in network.stages[-1].blocks[-2:]]
        self.affinity_heads = int(self._attentions[-1].num_heads)

    def forward(self, image: Tensor) -> BackboneOutput:
        """Normalised image [B, 3, H, W] -> pyramid and Q, K of the last two blocks."""
        with _recorded_calls(self._attentions) as calls:
            one, two, three, four = self.network.forward_intermediates(image, intermediates_only=True)
        (query_a, key_a), (query_b, key_b) = (
            self._project(attention, tokens) for attention, (tokens, _) in zip(self._attentions, calls, strict=True)
        )
        return BackboneOutput((one, two, three, four), (query_a, query_b), (key_a, key_b))

    @staticmethod
    def _project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        heads = (attention.num_heads, -1)
        query = attention.q(tokens).unflatten(2, heads)
        key = attention.kv(tokens).chunk(2, dim=2)[0].unflatten(2, heads)
        return query.transpose(1, 2), key.transpose(1, 2)


class VitBackbone(nn.Module):
    """A plain ViT: four maps on one grid."""

    def __init__(self, network: VisionTransformer | Eva) -> None:
        super().__init__()
        self.network = network
        width = int(network.embed_dim)
        self.channels = (width, width, width, width)
        self._attentions = [block.attn for block in network.blocks[-2:]]
        self.affinity_heads = int(self._attentions[-1].num_heads)
        depth = len(network.blocks)
        self._indices = [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]

    def forward(self, image: Tensor) -> BackboneOutput:
        """Normalised image [B, 3, H, W] -> four maps at the patch stride and Q, K of the last two blocks."""
        with _recorded_calls(self._attentions) as calls:
            one, two, three, four = self.network.forward_intermediates(
                image, indices=self._indices, norm=True, intermediates_only=True
            )
        (query_a, key_a), (query_b, key_b) = (
            self._project(attention, *call) for attention, call in zip(self._attentions, calls, strict=True)
        )
        return BackboneOutput((one, two, three, four), (query_a, query_b), (key_a, key_b))

    def _project(self, attention: Any, tokens: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Q and K of the patch tokens as the attention itself uses them, behind norm and rotary code."""
        if attention.qkv is None:
            query, key = attention.q_proj(tokens), attention.k_proj(tokens)
        else:
            projected = attention.qkv(tokens)
            if getattr(attention, "q_bias", None) is not None:
                projected = projected + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            query, key, _ = projected.chunk(3, dim=2)
        heads = (attention.num_heads, -1)
        prefix = int(self.network.num_prefix_tokens)
        query = attention.q_norm(query.unflatten(2, heads).transpose(1, 2))[:, :, prefix:]
        key = attention.k_norm(key.unflatten(2, heads).transpose(1, 2))[:, :, prefix:]
        if rope is not None:
            half = bool(getattr(attention, "rotate_half", False))
            query, key = apply_rot_embed_cat(query, rope, half=half), apply_rot_embed_cat(key, rope, half=half)
        return query, key


def build_timm(
    name: str, *, strides: tuple[int, int, int, int], drop_path_rate: float, pretrained: bool
) -> PyramidBackbone | VitBackbone:
    """Backbone of timm by its name there.

    Raises:
        InputError: timm does not know the name, its family is not supported, or its weights cannot be had.
    """
    plain_vit = name.startswith(("vit_", "deit_", "deit3_"))
    if not timm.is_model(name) or not (plain_vit or name.startswith("pvt_v2_b")):
        raise InputError(
            f"unknown backbone {name!r}: use mit_b0..mit_b5, pvt_v2_b0..pvt_v2_b5, "
            "or a plain ViT of timm (vit_*, deit_*, deit3_*)"
        )
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, "global_pool": ""} if plain_vit else {}
    try:
        network = timm.create_model(
            name, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path_rate, **options
        )
    except (OSError, RuntimeError, TypeError) as error:
        raise InputError(f"timm cannot build {name!r}{' with its weights' * pretrained}: {error}") from error
    if isinstance(network, PyramidVisionTransformerV2):
        return PyramidBackbone(network, strides)
    if isinstance(network, VisionTransformer | Eva):
        return VitBackbone(network)
    raise InputError(f"backbone {name!r} is a {type(network).__name__}, not a plain ViT")
