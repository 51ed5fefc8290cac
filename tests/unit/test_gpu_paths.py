"""What a GPU would be asked to do, on one that is pretended: no devices mixed, and waited for as rarely as can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PRETENCE = Path(__file__).parents[1] / "gpu_pretence"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built ``device.cpp``."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if torch.version.cuda is not None:
        pytest.skip("this torch knows real GPUs")
    made = tmp_path_factory.mktemp("gpu") / "device.so"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", PRETENCE / "device.cpp", "-o", made,
         f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    return made


@pytest.mark.parametrize("what", ["train", "ask", "crops"])
def test_a_gpu_is_handed_nothing_that_lies_elsewhere(library: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, PRETENCE / "compare.py", what],
        env={**os.environ, "PRETENDED_GPU": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
