"""Memory and time of listing a generated store: ``python tests/benchmarks/listing.py [OBJECTS]``."""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.inventory import InventoryWriter, load_units
from pipelines.label_sources import Listed


def generated(objects: int) -> Iterator[Listed]:
    """Objects in an order that is not the keys'."""
    source = random.Random(0)
    for index in range(objects):
        number = index * 7_368_787 % objects  # a prime: every number once
        uri = f"s3://bucket/photos/{number % 1000:03d}/{number:010d}-{number * 2654435761 % 2**32:08x}.jpg"
        yield Listed(uri[12:-4], uri, 120_000, f"{source.getrandbits(128):032x}", ("dog", "person"))


def main(objects: int) -> None:
    """Measure and print JSON."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "scratch"
        scratch.mkdir()
        writer = InventoryWriter(scratch)
        writer.gather(generated(objects))
        gathered_s = time.monotonic() - started
        generation = writer.write(f"{folder}/run", "0000", "listing", "identity", 64, 256 * 10**6)
        writer.close()
        units = sum(1 for _ in load_units(f"{folder}/run", generation))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    facts = {
        "objects": generation.inputs,
        "units": units,
        "inventory_mib": round(size / 2**20, 1),
        "gather_s": round(gathered_s, 1),
        "total_s": round(time.monotonic() - started, 1),
        "start_mib": before_kib // 1024,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
