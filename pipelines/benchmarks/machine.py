"""What machine a benchmark ran on, and the roofline its kernels are held against: measured, not off a data sheet."""

from __future__ import annotations

import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch

from afa_core.backbone import kernels
from pipelines.benchmarks.measure import repeat

COPIED_BYTES = 256 * 2**20  # far more than any cache
PRODUCT_SIDE = 2048


def describe_machine() -> dict[str, Any]:
    """Processor, threads, memory, GPU, versions; nothing that names the machine or its user."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts: dict[str, Any] = {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "tf32": torch.backends.cuda.matmul.allow_tf32}
    return facts


def roofline(device: torch.device) -> dict[str, float]:
    """Copy bandwidth in bytes/s (read and written) and rate of 32-bit products in operations/s, of this machine now."""
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    square = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE, device=device)
    products = [partial(kernels.linear, square, square, None, fast=fast) for fast in (False, True)]
    return {
        "bytes_per_s": 2 * COPIED_BYTES / min(repeat(lambda: target.copy_(source), 5)),
        "operations_per_s": max(2 * PRODUCT_SIDE**3 / min(repeat(product, 5)) for product in products),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    for line in facts.read_text().splitlines() if facts.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
