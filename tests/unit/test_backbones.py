"""Backbones: shapes, gradients, the affinity's one-product form, and what cannot be built."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from afa_core.backbone import build_backbone
from afa_core.backbone.kernels import attend
from afa_core.backbone.mit import SIZES
from afa_core.config import ModelConfig
from afa_core.errors import InputError
from afa_core.model import AFANet

SMALL = ["mit_b0", "pvt_v2_b0", "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_dinov3"]


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_gradient_and_grids_fit(name: str) -> None:
    model = AFANet(ModelConfig(backbone=name, drop_path_rate=0.0), 5).train()
    output = model(torch.randn(1, 3, 70, 97))
    assert output.class_logits.shape == (1, 5)
    assert output.seg_logits.shape == (1, 6, *output.backbone.features[0].shape[2:])
    tokens = output.backbone.grid[0] * output.backbone.grid[1]
    assert output.backbone.grid == (5, 7)
    assert output.affinity.shape == (1, tokens, tokens)
    (output.class_logits.sum() + output.seg_logits.sum() + output.affinity.sum()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_one_product_affinity_is_the_convolution_over_heads(name: str) -> None:
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone=name), 3).eval()
    torch.nn.init.normal_(model.affinity_head.head_weight)
    output = model(torch.randn(2, 3, 64, 80))
    logits = output.backbone.attention_logits
    head = model.affinity_head
    expected = F.conv2d(logits + logits.transpose(2, 3), head.head_weight[None, :, None, None], head.bias[None])
    torch.testing.assert_close(output.affinity, expected[:, 0].sigmoid(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.affinity, output.affinity.transpose(1, 2))


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_recorded_queries_and_keys_are_those_of_the_attention(name: str) -> None:
    """Rebuilding the block's attention from them gives what timm's own attention computed."""
    backbone = build_backbone(name, drop_path_rate=0.0).eval()
    last = backbone._attentions[-1]  # type: ignore[union-attr]
    seen: dict[str, torch.Tensor] = {}
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: object) -> torch.Tensor:
        seen.update(query=query, key=key)
        return original(query, key, value, **rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        output = backbone(torch.randn(1, 3, 64, 64))
    prefix = seen["query"].shape[2] - output.queries[1].shape[2]
    assert last.fused_attn
    torch.testing.assert_close(output.queries[1], seen["query"][:, :, prefix:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.keys[1], seen["key"][:, :, prefix:], atol=1e-5, rtol=1e-4)


def test_mit_sizes_have_the_published_number_of_parameters() -> None:
    """Millions of parameters of the encoders, SegFormer table 1 (0.1 for rounding)."""
    published = {"mit_b0": 3.4, "mit_b1": 13.1, "mit_b2": 24.2, "mit_b3": 44.0, "mit_b4": 60.8, "mit_b5": 81.4}
    for name, millions in published.items():
        with torch.device("meta"):
            backbone = build_backbone(name)
        count = sum(parameter.numel() for parameter in backbone.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.65), name
    assert set(published) | {"mit_tiny"} == set(SIZES)


def test_spelled_out_attention_is_attention() -> None:
    query, key, value = (torch.randn(2, 3, size, 8) for size in (20, 11, 11))
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value, fast=False), expected, atol=1e-5, rtol=1e-5)


def test_strides_are_configurable() -> None:
    output = build_backbone("mit_b0", strides=(4, 2, 2, 2))(torch.randn(1, 3, 64, 64))
    assert [feature.shape[2] for feature in output.features] == [16, 8, 4, 2]
    output = build_backbone("pvt_v2_b0", strides=(4, 2, 2, 2))(torch.randn(1, 3, 64, 64))
    assert [feature.shape[2] for feature in output.features] == [16, 8, 4, 2]


@pytest.mark.parametrize("name", ["resnet50", "mit_b9", "vit_nonsense", "swin_tiny_patch4_window7_224"])
def test_unknown_backbones_are_named(name: str) -> None:
    with pytest.raises(InputError, match=name):
        build_backbone(name)


def test_timm_has_no_weights_for_mit() -> None:
    with pytest.raises(InputError, match="published checkpoint"):
        build_backbone("mit_b0", timm_weights=True)
