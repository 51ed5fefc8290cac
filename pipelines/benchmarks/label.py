"""``afa bench label``: the labelling job on a folder of pictures, against a bare loop over pictures in memory.

The bare loop has the model, the decoded pictures and nothing else to do; one thread. The jobs are the real command with
workers of one thread each: images/s between the commits of their first and last unit, start-up until the first commit
less the time of that unit's stages. Cases take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from afa_core.backbone import kernels
from afa_core.checkpoint import load_bundle, save_bundle
from afa_core.config import CamConfig, LabelConfig, ModelConfig, ParConfig
from afa_core.data.sample import decode_image
from afa_core.labelling import label_pictures
from afa_core.model import build_model
from pipelines.benchmarks.cases import check_numbers
from pipelines.benchmarks.measure import Measurement, in_own_process, peak_mib
from pipelines.errors import UsageError
from pipelines.label_set import committed_names, list_runs, load_markers

CLASSES = ("disc", "ring", "square")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa bench label``."""
    parser.add_argument("--model", type=Path, help="bundle folder (default: a small one with random weights)")
    parser.add_argument("--pictures", type=int, default=256, help="pictures a job labels (%(default)s)")
    parser.add_argument("--side", type=int, default=256, metavar="PIXELS", help="of a picture (%(default)s)")
    parser.add_argument("--unit-size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=worker_numbers(), help="a job for each number")
    parser.add_argument("--rounds", type=int, default=1, help="turns that the cases take")


def worker_numbers() -> list[int]:
    """One and two, but not more than there are GPUs: each worker has one."""
    return [1] if torch.cuda.device_count() == 1 else [1, 2]


def run(arguments: argparse.Namespace) -> list[Measurement]:
    """The bare loop, then a job for each number of workers."""
    check_numbers(arguments, {"side": 2, "unit_size": 1, "workers": 1, "rounds": 1})
    if arguments.pictures < 3 * arguments.unit_size:
        raise UsageError(f"--pictures {arguments.pictures}: a job needs three units (--unit-size) to show a rate")
    with tempfile.TemporaryDirectory(prefix="afa-bench-") as scratch:
        pictures = make_pictures(Path(scratch) / "pictures", arguments.pictures, arguments.side)
        bundle = arguments.model or make_bundle(Path(scratch) / "bundle")
        loops, jobs = [], {workers: list[Measurement]() for workers in arguments.workers}
        for _ in range(arguments.rounds):
            loops.append(in_own_process(bare_loop, bundle, pictures, min(64, arguments.pictures)))
            for workers, made in jobs.items():
                made.append(job(bundle, pictures, Path(scratch) / "labels", workers, arguments))
    best = [min(loops, key=lambda item: item.median_s)]
    best += [min(made, key=lambda item: item.median_s) for made in jobs.values()]
    return best


def make_pictures(folder: Path, count: int, side: int) -> Path:
    """Smooth random JPEGs."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{index:06d}.jpg").write_bytes(buffer.getvalue())
    return folder


def make_bundle(folder: Path) -> Path:
    """A bundle with random weights: as slow as a trained one."""
    torch.manual_seed(0)
    config = ModelConfig(backbone="mit_b0")
    folder.mkdir()
    save_bundle(
        folder, build_model(config, len(CLASSES)), CLASSES, config, CamConfig(), ParConfig(),
        LabelConfig(tag_probability=0.0),
    )  # fmt: skip
    return folder


def bare_loop(bundle_dir: Path, folder: Path, count: int) -> Measurement:
    """Labels in a loop, in this process, on one thread."""
    torch.set_num_threads(1)
    bundle = load_bundle(bundle_dir, kernels.best_device())
    paths = sorted(folder.iterdir())[:count]
    images = [decode_image(path.read_bytes(), 100.0) for path in paths]
    label_pictures(bundle, images[:1], [None])
    began = time.perf_counter()
    for image in images:
        label_pictures(bundle, [image], [None])
    seconds = time.perf_counter() - began
    return Measurement(name="label/bare loop", seconds=(seconds,), images=count, peak_mib=peak_mib())


def job(bundle: Path, pictures: Path, output: Path, workers: int, arguments: argparse.Namespace) -> Measurement:
    """The real command, in processes of its own."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable, "-m", "pipelines.pseudo_label", "--model", bundle, "--input", pictures, "--output", output,
        "--workers", workers, "--unit-size", arguments.unit_size,
    ]  # fmt: skip
    began = time.time()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    answer = subprocess.run(
        list(map(str, command)), env=os.environ | threads, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        said = answer.stderr.strip().splitlines() or [f"status {answer.returncode}"]
        raise UsageError(f"the job failed: {said[-1]}")
    run_of = next(iter(list_runs(str(output))))
    markers = sorted(load_markers(run_of, committed_names(run_of)), key=lambda marker: marker.finished)
    first, last = markers[0], markers[-1]
    counted = sum(marker.images for marker in markers[1:])
    return Measurement(
        name=f"label/job, {workers} workers" if workers > 1 else "label/job, 1 worker",
        seconds=(last.finished - first.finished,),
        images=counted,
        facts={
            "start-up, s": round(first.finished - began - sum(first.stage_seconds.values()), 1),
            "stages, s": {
                name: round(sum(marker.stage_seconds[name] for marker in markers), 2) for name in first.stage_seconds
            },
        },
    )
