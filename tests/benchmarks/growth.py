"""Time and memory of label, verify-labels and export as a store grows: ``PYTHONPATH=tests python
tests/benchmarks/growth.py 256 1024 4096``, and of photographs' sizes, each another: ``... --sizes 64 128 256``.

Tiny pictures and an untrained model: what is measured is what each picture costs beside the network; with ``--sizes``
mit_b0 at three scales, and what ever new sizes cost. A line of JSON for each store.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from commands import afa_command
from labelling import picture
from PIL import Image
from processes import descendants

from afa_core.checkpoint import save_bundle
from afa_core.classes import SHAPES
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.model import build_model

SIZE_PX = 32
SIDES_PX = (260, 512)  # of pictures of ever new sizes
FOLDERS = 16
DRAWN = 64
WORKER = "ray::MapWorker"


def write_store(folder: Path, pictures: int) -> None:
    """So many pictures, ``DRAWN`` of them different, and one bad one for every hundred."""
    drawn = [picture(index, SIZE_PX) for index in range(DRAWN)]
    for index in range(pictures):
        path = folder / f"{index % FOLDERS:02d}" / f"{index:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture" if index % 100 == 99 else drawn[index % DRAWN])


def write_sizes(folder: Path, pictures: int) -> None:
    """So many pictures, hardly two of one size."""
    folder.mkdir()
    sides = random.Random(0)
    largest = Image.open(io.BytesIO(picture(0, SIDES_PX[1])))
    for index in range(pictures):
        size = (sides.randint(*SIDES_PX), sides.randint(*SIDES_PX)) if index else largest.size
        largest.resize(size).convert("RGB").save(folder / f"{index:05d}.jpg")


def write_bundle(folder: Path, *, smallest: bool) -> None:
    """The smallest model there is, or mit_b0."""
    if smallest:
        config = ModelConfig(backbone="mit_tiny", decoder_channels=16)
        cam, par = CamConfig(scales=(1.0,), affinity_radius=2), ParConfig(dilations=(1,), iterations=1)
        label = LabelConfig(max_side_px=64)
    else:
        config, cam, par, label = ModelConfig(backbone="mit_b0"), CamConfig(), ParConfig(), LabelConfig()
    torch.manual_seed(0)
    folder.mkdir()
    save_bundle(folder, build_model(config, len(SHAPES)), SHAPES, config, cam, par, label)


def peak_mib(pid: int) -> int:
    """Most resident memory that a process has had so far; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def measured(*words: object) -> dict[str, float]:
    """Run a command; its seconds, and the peak memory in MiB of itself and of its largest worker."""
    started = time.monotonic()
    facts = {"s": 0.0, "driver_mib": 0, "worker_mib": 0}
    process = subprocess.Popen(afa_command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            facts["driver_mib"] = max(facts["driver_mib"], peak_mib(process.pid))
            workers = [pid for pid, command in descendants(process.pid).items() if WORKER in command]
            facts["worker_mib"] = max([facts["worker_mib"], *map(peak_mib, workers)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, error = process.communicate()
    ended.set()
    watcher.join()
    assert process.returncode == 0, error
    facts["s"] = round(time.monotonic() - started, 1)
    return {name: value for name, value in facts.items() if value}


def main(pictures: int, *, sizes: bool) -> None:
    """Label, verify and export one store."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (write_sizes if sizes else write_store)(folder / "store", pictures)
        write_bundle(folder / "bundle", smallest=not sizes)
        commands = {
            "label": ["--model", folder / "bundle", "--input", folder / "store", "--output", folder / "out"],
            "verify-labels": [folder / "out"],
            "export": [folder / "out", "--format", "coco", "--output", folder / "coco"],
        }
        facts = {name: measured(name, *words) for name, words in commands.items()}
        print(json.dumps({"pictures": pictures, **facts}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("pictures", type=int, nargs="+")
    parser.add_argument("--sizes", action="store_true", help="photographs' sizes, each another")
    arguments = parser.parse_args()
    for number in arguments.pictures:
        main(number, sizes=arguments.sizes)
