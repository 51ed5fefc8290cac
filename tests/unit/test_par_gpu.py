"""The GPU's kernels of PAR without a GPU: run by Triton's interpreter, and compiled for an A100 and an H100.

torch's builds for CUDA bring Triton. Beside another one it is installed for these tests alone: of the project's own
requirements it can be none, as each build wants its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import pip_install

TRITON = "triton==3.8.0"

RUN = """
import torch
from afa_core import par, par_gpu
from afa_core.config import ParConfig

torch.manual_seed(0)
for config, (batch, maps, height, width) in (
    (ParConfig(iterations=3), (2, 5, 37, 53)),
    (ParConfig(dilations=(1, 3), iterations=2), (1, 11, 9, 300)),
):
    image, values = torch.rand(batch, 3, height, width), torch.rand(batch, maps, height, width)
    position = config.position_weight * par._position_weights(config, image.device)
    offsets = par._offsets(config, image.device)
    weights = par_gpu.neighbour_weights(image, offsets, position, config.colour_bandwidth, par.SIGMA_EPSILON)
    torch.testing.assert_close(weights, par.neighbour_weights(image, config), atol=1e-5, rtol=0)
    expected = par.refine(image, values, config)
    for _ in range(config.iterations):
        values = par_gpu.step(values, weights, offsets)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from afa_core import par_gpu

SIZES = ("maps_count", "height", "width")
TYPES = {"offsets": "*i32", "bandwidth": "fp32", "epsilon": "fp32"} | dict.fromkeys(SIZES, "i32")
for capability in (80, 90):
    for kernel, sizes in (
        (par_gpu._weights_kernel, {"COUNT": 48, "PIXELS": par_gpu.PIXELS}),
        (par_gpu._step_kernel, {"COUNT": 48, "PIXELS": par_gpu.PIXELS, "GROUP": par_gpu.MOST_MAPS}),
    ):
        signature = {name: "constexpr" if name in sizes else TYPES.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""

NO_GPU = """
import torch
from afa_core import par
assert not par.kernels_run(torch.device("cpu"))
"""


@pytest.fixture(scope="module")
def triton_path() -> Iterator[str]:
    """What Python needs to be told to find Triton; it fills a gigabyte and is not kept."""
    if find_spec("triton"):
        yield ""
        return
    with tempfile.TemporaryDirectory(prefix="afa-triton-") as folder:
        pip_install(sys.executable, "--no-deps", "--target", folder, TRITON)
        yield folder


def python(script: str, interpret: str, triton_path: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {
            "PYTHONPATH": triton_path, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("script", "interpret"), [(RUN, "1"), (COMPILE, "0")], ids=["run", "compile"])
def test_the_kernels_are_par_and_compile(script: str, interpret: str, triton_path: str, tmp_path: Path) -> None:
    answer = python(script, interpret, triton_path, tmp_path)
    assert answer.returncode == 0, answer.stderr


def test_where_triton_cannot_start_par_says_so_and_goes_without(triton_path: str, tmp_path: Path) -> None:
    answer = python(NO_GPU, "0", triton_path, tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.startswith("PAR goes without its GPU kernels")
    assert answer.stderr.count("\n") == 1
