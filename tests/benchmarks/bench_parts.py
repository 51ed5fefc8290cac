"""The parts of a step and of labelling, one by one, with pytest-benchmark (``pip install 'afa-pipelines[bench]'``).

    python -m pytest tests/benchmarks/bench_parts.py [--benchmark-json FILE] [--benchmark-compare]

Not part of the test suite: nothing here fails because a machine is busy.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from afa_core import par
from afa_core.affinity import PairAffinity, RandomWalk
from afa_core.backbone import kernels
from afa_core.backbone.mit import MixFeedForward
from afa_core.classes import palette
from afa_core.config import ModelConfig, ParConfig
from afa_core.data.sample import decode_image
from afa_core.decoder import SegFormerDecoder
from afa_core.model import build_model

Benchmark = Any  # pytest-benchmark's fixture has no public type


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize(("tokens", "channels", "out"), [(36864, 64, 256), (2304, 512, 2048)])
def test_linear(benchmark: Benchmark, tokens: int, channels: int, out: int, fast: bool) -> None:
    values, weight, bias = torch.rand(1, tokens, channels), torch.rand(out, channels), torch.rand(out)
    benchmark(kernels.linear, values, weight, bias, fast=fast)


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize(("heads", "queries", "keys"), [(1, 16384, 256), (8, 1024, 1024)])
def test_attention(benchmark: Benchmark, heads: int, queries: int, keys: int, fast: bool) -> None:
    query, key = torch.rand(1, heads, queries, 64), torch.rand(1, heads, keys, 64)
    with torch.no_grad():
        benchmark(kernels.attend, query, key, key, fast=fast)


@pytest.mark.parametrize("fast", [False, True], ids=["whole", "strips"])
def test_feed_forward(benchmark: Benchmark, fast: bool) -> None:
    layer, tokens = MixFeedForward(64), torch.rand(1, 192 * 192, 64)
    with torch.no_grad():
        benchmark(layer, tokens, (192, 192), fast=fast)


@pytest.mark.parametrize("side", [320, 512])
def test_encoder(benchmark: Benchmark, side: int) -> None:
    model, image = build_model(ModelConfig(), 20).eval(), torch.rand(1, 3, side, side)
    with torch.no_grad():
        benchmark(model.backbone, image)


def test_decoder(benchmark: Benchmark) -> None:
    widths, sides = (64, 128, 320, 512), (80, 40, 20, 20)
    decoder = SegFormerDecoder(widths, 256, 21, 0.1).eval()
    features = [torch.rand(1, width, side, side) for width, side in zip(widths, sides, strict=True)]
    with torch.no_grad():
        benchmark(decoder, features)


@pytest.mark.parametrize("side", [160, 256])
def test_par_weights(benchmark: Benchmark, side: int) -> None:
    benchmark(par.neighbour_weights, torch.rand(1, 3, side, side), ParConfig())


@pytest.mark.parametrize("side", [160, 256])
def test_par_iterations(benchmark: Benchmark, side: int) -> None:
    image, maps = torch.rand(1, 3, side, side), torch.rand(1, 6, side, side)
    benchmark(par.refine, image, maps, ParConfig(), par.neighbour_weights(image, ParConfig()))


def test_walk(benchmark: Benchmark) -> None:
    maps, (query, key) = torch.rand(1, 6, 48, 48), torch.rand(2, 1, 2304, 1024)
    affinity = PairAffinity(query, key, torch.zeros(()))
    benchmark(lambda: RandomWalk(affinity, (48, 48), radius=8, power=2.0, iterations=1)(maps))


@pytest.mark.parametrize("level", [1, 6, 9])
def test_mask_encoding(benchmark: Benchmark, level: int) -> None:
    """Compression levels of a palette PNG; its size is in the extra info."""
    coarse = np.random.default_rng(0).integers(0, 3, (12, 16), np.uint8)
    mask = Image.fromarray(coarse).resize((500, 375), Image.Resampling.NEAREST).rotate(7)
    mask.putpalette(palette())

    def encode() -> int:
        buffer = io.BytesIO()
        mask.save(buffer, "PNG", compress_level=level)
        return buffer.tell()

    benchmark.extra_info["bytes"] = benchmark(encode)


def test_picture_decoding(benchmark: Benchmark) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    benchmark(decode_image, buffer.getvalue(), 100.0)
