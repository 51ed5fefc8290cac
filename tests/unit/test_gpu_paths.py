"""What a GPU would be asked to do, on one that is pretended: no devices mixed, and waited for as rarely as can be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PRETENCE = Path(__file__).parents[1] / "gpu_pretence"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real GPUs")
@pytest.mark.parametrize("what", ["train", "ask", "crops"])
def test_a_gpu_is_handed_nothing_that_lies_elsewhere(what: str) -> None:
    command = [sys.executable, PRETENCE / "compare.py", what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
