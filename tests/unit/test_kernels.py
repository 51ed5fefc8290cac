"""The fast way of the backbone against the exact one: products, attention, strips, whole passes and their gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from afa_core.backbone import kernels
from afa_core.backbone.mit import MixFeedForward, MixTransformer
from afa_core.cam import multi_scale_cam
from afa_core.config import ModelConfig
from afa_core.model import AFANet, build_model
from afa_core.packing import Packing
from pipelines.benchmarks import plain_form
from pipelines.speed import SpeedConfig, apply_speed


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.fixture(params=["onednn", "mkl"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products are taken: the one or the other is on this machine."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(kernels, "onednn_is_faster", lambda: request.param == "onednn")
    return str(request.param)


@pytest.mark.usefixtures("products")
def test_a_fast_product_and_its_gradients_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    tokens, weight, bias = torch.randn(2, 5, 7, 24), torch.randn(40, 24), torch.randn(40)
    results = []
    for fast in (False, True):
        leaves = [value.clone().requires_grad_() for value in (tokens, weight, bias)]
        result = kernels.linear(*leaves, fast=fast)
        (result * torch.linspace(0, 1, 40)).sum().backward()
        results.append([result, *(leaf.grad for leaf in leaves)])
    for exact, fast_result in zip(*results, strict=True):
        torch.testing.assert_close(fast_result, exact, atol=1e-4, rtol=1e-5)


def test_fast_products_are_left_to_torch_where_onednn_has_none() -> None:
    tokens, weight = torch.randn(3, 8).double(), torch.randn(4, 8).double()
    assert torch.equal(kernels.linear(tokens, weight, None, fast=True), F.linear(tokens, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(tokens.float(), weight.float(), None, fast=True).dtype == torch.bfloat16


@pytest.mark.usefixtures("products")
def test_under_torch_compile_products_are_torchs_own() -> None:
    """Its compiler stops at oneDNN's with an error, of weights that are no constants."""
    operations: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        operations.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    tokens, layer = torch.randn(2, 30, 24), torch.nn.Linear(24, 40)
    product = torch.compile(partial(kernels.linear, fast=True), backend=backend, fullgraph=True)
    torch.testing.assert_close(product(tokens, layer.weight, layer.bias), layer(tokens), atol=1e-4, rtol=1e-5)
    assert operations
    assert not [operation for operation in operations if "mkldnn" in operation]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("shape", [(2, 3, 50, 8, 11), (1, 1, 700, 16, 1200)])
def test_attention_in_pieces_is_attention(
    shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, length, channels, keys = shape
    monkeypatch.setattr(kernels, "PIECE_LOGITS", 300 * 1200)
    query = torch.randn(batch, length, heads, channels).transpose(1, 2)
    key, value = (torch.randn(batch, keys, heads, channels).transpose(1, 2) for _ in range(2))
    with torch.no_grad():
        fast = kernels.attend(query, key, value, fast=True)
    torch.testing.assert_close(fast, kernels.attend(query, key, value, fast=False), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 3000), st.integers(1, 500))
def test_even_cuts_are_few_even_and_cover_all(length: int, most: int) -> None:
    cuts = kernels.even_cuts(length, most)
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    assert cuts[-1][1] == length
    sizes = {stop - start for start, stop in cuts}
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(cuts) == math.ceil(length / most)


def test_large_pictures_train_without_torchs_compiler() -> None:
    """Its import is 70 MiB; torch's own checkpoint does it."""
    lines = """
import sys, torch
from afa_core.config import ModelConfig
from afa_core.model import AFANet
model = AFANet(ModelConfig(backbone="mit_tiny"), 3)
output = model(torch.rand(1, 3, 256, 256))
(output.seg_logits.mean() + output.affinity.mean() + output.class_logits.mean()).backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", lines], check=True, timeout=120)


@pytest.mark.parametrize("side", [16, 8])
def test_the_plain_form_keeps_the_logits_of_attention_on_the_grid_of_its_keys(side: int) -> None:
    query, key, value = torch.randn(2, 3, 256, 8), torch.randn(2, 3, side**2, 8), torch.randn(2, 3, side**2, 8)
    plain_form._kept_logits.clear()
    attended = plain_form._attend_keeping_logits(query, key, value, fast=False)
    assert torch.equal(attended, kernels.attend(query, key, value, fast=False))
    [kept] = plain_form._kept_logits
    logits = (query @ key.transpose(2, 3)).unflatten(2, (side, 16 // side, side, 16 // side))
    pooled = logits.mean((3, 5)).flatten(2, 3)  # queries pooled, keys as they are
    keys_first = pooled.transpose(2, 3) if side < 16 else pooled
    torch.testing.assert_close(kept.reshape(2, 3, side**2, side**2), keys_first)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("norm_trained", [False, True])
def test_a_feed_forward_in_strips_is_the_whole_with_its_gradients(
    norm_trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, norm = MixFeedForward(8), torch.nn.LayerNorm(8)
    both = torch.nn.ModuleList([layer, norm])
    norm.weight.requires_grad_(norm_trained)
    monkeypatch.setattr("afa_core.backbone.mit.STRIP_ACTIVATIONS", 3 * 6 * 32)  # three rows of six tokens
    tokens = torch.randn(2, 7 * 6, 8)
    results = []
    for fast in (False, True):
        leaf = tokens.clone().requires_grad_()
        both.zero_grad()
        mixed = layer(leaf, norm, (7, 6), fast=fast)
        mixed.square().sum().backward()
        results.append([mixed, leaf.grad, *gradients(both)])
    assert len(results[0]) == len(results[1]) == 2 + 6 + 1 + norm_trained
    for exact, strips in zip(*results, strict=True):
        torch.testing.assert_close(strips, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("products")
def test_fast_passes_keep_the_tolerances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and logits 1e-4 relative, maps of labelled classes and affinity 1e-5, gradients 1e-3."""
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone="mit_b0", drop_path_rate=0.0, decoder_dropout=0.0), 6).eval()
    image = torch.randn(2, 3, 96, 128)
    packing = Packing.of(torch.tensor([[1.0, 0, 0, 1, 0, 0], [0, 1.0, 0, 0, 0, 0]]))
    results = []
    for threshold in (2**62, 0):
        monkeypatch.setattr(kernels, "FAST_FROM_PIXELS", threshold)
        cam = multi_scale_cam(model, image, (1.0, 0.5, 1.5), packing)
        output = model(image)
        model.zero_grad()
        (output.class_logits.sum() + output.seg_logits.square().mean() + output.affinity.mean()).backward()
        norm = torch.stack([gradient.norm() for gradient in gradients(model)]).norm()
        results.append((output, cam, norm))
    (exact, exact_cam, exact_norm), (fast, fast_cam, fast_norm) = results
    for mine, reference in zip(fast.backbone.features, exact.backbone.features, strict=True):
        assert (mine - reference).abs().max() < 1e-4 * reference.abs().max()
    torch.testing.assert_close(fast.seg_logits, exact.seg_logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast_cam.cam, exact_cam.cam, atol=1e-5, rtol=0)
    fast_affinity, exact_affinity = (cam.affinity(slice(None), slice(None)) for cam in (fast_cam, exact_cam))
    torch.testing.assert_close(fast_affinity, exact_affinity, atol=1e-5, rtol=0)
    assert float(fast_norm) == pytest.approx(float(exact_norm), rel=1e-3)


def test_gradient_checkpointing_changes_memory_alone() -> None:
    torch.manual_seed(0)
    model = AFANet(ModelConfig(backbone="mit_tiny", drop_path_rate=0.5), 3).train()
    image = torch.randn(2, 3, 64, 64)
    assert isinstance(model.backbone, MixTransformer)
    results = []
    for checkpointed in (False, True):
        model.backbone.gradient_checkpointing = checkpointed
        model.zero_grad()
        torch.manual_seed(1)
        model(image).class_logits.sum().backward()
        results.append(gradients(model.backbone))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


def test_numbers_of_32_bits_keep_them_on_a_gpu_unless_a_training_job_says_so() -> None:
    def rounded() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    model = build_model(ModelConfig(backbone="mit_tiny", decoder_channels=16), 2)
    assert rounded() == (False, False)
    apply_speed(SpeedConfig(tf32=True), model.backbone)
    assert rounded() == (True, True)
    kernels.allow_tf32(False)
