"""Memory that malloc holds and nobody uses goes back to the system, and labelling sees to it."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from afa_core import host_memory, labelling
from afa_core.checkpoint import Bundle
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.model import AFANet

# Blocks just below what malloc maps on their own; of fifty one stays in use.
SCATTERED = """
from afa_core import host_memory
blocks = [bytearray(100_000) for _ in range(5000)]
kept = blocks[::50]
del blocks
before = host_memory._resident()
host_memory.return_free_memory_if_grown()
returned = before - host_memory._resident()
assert returned > 400e6, returned
calls = []
host_memory.return_free_memory = lambda: calls.append(1)
host_memory.return_free_memory_if_grown()
assert not calls
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_scattered_free_memory_is_returned_once_there_is_much() -> None:
    subprocess.run([sys.executable, "-c", SCATTERED], check=True, timeout=60)


def test_labelling_asks_for_it_before_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(labelling, "return_free_memory_if_grown", lambda: asked.append(1))
    config = ModelConfig(backbone="mit_tiny")
    bundle = Bundle(
        model=AFANet(config, 1).eval(),
        classes=("dog",),
        model_config=config,
        cam_config=CamConfig(scales=(1.0,)),
        par_config=ParConfig(),
        label_config=LabelConfig(),
        digest="",
    )
    images = [np.zeros((side, 64, 3), np.uint8) for side in (64, 65, 64)]
    labelling.label_pictures(bundle, images, [("dog",)] * 3)
    assert len(asked) == 2


def test_other_systems_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_STATM", host_memory.Path("/nowhere"))
    host_memory.return_free_memory_if_grown()
