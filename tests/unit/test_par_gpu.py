"""The GPU's kernels of PAR, run by Triton's interpreter where Triton is installed (torch's CUDA builds bring it)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from afa_core import par, par_gpu
from afa_core.config import ParConfig

torch.manual_seed(0)
for config, (batch, maps, height, width) in (
    (ParConfig(iterations=3), (2, 5, 37, 53)),
    (ParConfig(dilations=(1, 3), iterations=2), (1, 11, 9, 300)),
):
    image, values = torch.rand(batch, 3, height, width), torch.rand(batch, maps, height, width)
    position = config.position_weight * par._position_weights(config)
    offsets = par._offsets(config, image.device)
    weights = par_gpu.neighbour_weights(image, offsets, position, config.colour_bandwidth, par.SIGMA_EPSILON)
    torch.testing.assert_close(weights, par.neighbour_weights(image, config), atol=1e-5, rtol=0)
    expected = par.refine(image, values, config)
    for _ in range(config.iterations):
        values = par_gpu.step(values, weights, offsets)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
"""


def test_the_kernels_are_par() -> None:
    pytest.importorskip("triton")
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
