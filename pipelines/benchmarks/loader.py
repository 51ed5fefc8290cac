"""How fast training is fed: from decoding alone to batches out of loading threads, and other formats beside it.

The measure is processor time of all threads and processes of a case together, so that images/s are those of one core,
however many work and whatever else the machine does. Bare decoding is that of the same bytes, held in memory, to the
same pixels, by the same decoder, and nothing else. All cases have the same pictures and decoding and the same draws of
the augmentation, and take turns. What is read lies in the page cache: this is about processors, not disks.

A batch is loaded when it is all there for the device, which makes the crops: what that costs, where the device is this
processor, has cases of its own. LitData's loading processes send crops, which is what they are fastest with.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from afa_core.config import DataConfig
from afa_core.data.draws import Draws
from afa_core.data.loading import PREFETCH, load_batches
from afa_core.data.order import SampleOrder
from afa_core.data.sample import BadSample, decode_image, decode_sample, encode_sample
from afa_core.data.shards import ShardWriter
from afa_core.data.train_samples import TrainBatch, TrainSamples, collate
from afa_core.data.transforms import TrainItem, TrainTransform
from afa_core.errors import InputError
from pipelines.benchmarks.cases import check_numbers
from pipelines.benchmarks.measure import Measurement, in_own_process

CLASSES = ("thing",)
FACTS = json.dumps({"tags": list(CLASSES), "width": 500, "height": 375, "source": "benchmark"}).encode()
SHARD_PICTURES = 250
GENERATED = 64  # different pictures; there are as many copies as it takes
SEED = 0

Stamped = tuple[Any, int, float]  # a batch, the process that made it, the processor seconds it has used so far


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``afa bench loader``."""
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs; else photograph-like ones are generated")
    parser.add_argument("--limit", type=int, default=500, help="pictures a repetition reads (%(default)s)")
    parser.add_argument("--crop-px", type=int, default=512, help="side of the crops (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="crops a batch (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="counted turns of every case (%(default)s)")


def run(arguments: argparse.Namespace) -> list[Measurement]:
    """Measure every case; ``seconds`` are processor seconds.

    Raises:
        UsageError: a number is too small.
        InputError: the folder has no JPEG.
    """
    check_numbers(arguments, {"limit": 1, "crop_px": 1, "batch_size": 1, "repetitions": 1})
    if not has_litdata():
        sys.stderr.write("litdata is left out: it is not installed (pip install 'afa-pipelines[bench]')\n")
    measured: list[Measurement] = in_own_process(_measure, arguments)
    return measured


def has_litdata() -> bool:
    """Whether LitData can be compared with."""
    return importlib.util.find_spec("litdata") is not None


@dataclass
class Case:
    """A way to read all the pictures once.

    Attributes:
        name: of the measurement.
        batches: gives the batches of one repetition.
        clocks: processor seconds of each loading process when it was last heard of.
    """

    name: str
    batches: Callable[[], Iterable[Stamped]]
    seconds: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    clocks: dict[int, float] = field(default_factory=dict)

    def take_turn(self) -> None:
        """Read once. What a loading process used before its first batch (its start) is not counted."""
        began, began_wall = time.process_time(), time.perf_counter()
        before = dict(self.clocks)
        for _, process, clock in self.batches():
            self.clocks[process] = clock
        used = time.process_time() - began
        used += sum(
            clock - before.get(process, clock) for process, clock in self.clocks.items() if process != os.getpid()
        )
        self.seconds.append(used)
        self.wall_s.append(time.perf_counter() - began_wall)


def _measure(arguments: argparse.Namespace) -> list[Measurement]:
    torch.set_num_threads(1)
    # As in training, whose tensors teach malloc to keep memory of such sizes instead of giving it back each time.
    torch.empty(24 * 2**20, dtype=torch.uint8)
    pictures = load_pictures(arguments.pictures, arguments.limit)
    with tempfile.TemporaryDirectory(prefix="afa-bench-") as scratch:
        cases = build_cases(pictures, Path(scratch), arguments.crop_px, arguments.batch_size)
        for _ in range(1 + arguments.repetitions):
            for case in cases:
                case.take_turn()
    return [_measurement(case, cases[0], len(pictures)) for case in cases]


def _measurement(case: Case, decoder: Case, pictures: int) -> Measurement:
    seconds = tuple(case.seconds[1:])  # the first turn opened files and started processes
    share = median(bare / own for bare, own in zip(decoder.seconds[1:], seconds, strict=True))
    facts = {"share_of_decoder": round(share, 3), "wall_images_per_s": round(pictures / median(case.wall_s[1:]), 1)}
    return Measurement(name=case.name, seconds=seconds, images=pictures, facts=facts)


def build_cases(pictures: Sequence[bytes], folder: Path, crop_px: int, batch_size: int) -> list[Case]:
    """All cases over the same pictures; the bare decoder is the first."""
    plain = DataConfig(crop_px=crop_px, rescale=(1.0, 1.0))
    full = DataConfig(crop_px=crop_px)
    loose = write_loose(pictures, folder / "loose")
    shards = write_shards(pictures, folder / "shards")
    loaders: dict[str, Callable[[], Iterable[Stamped]]] = {
        "bare decoder": partial(decode_all, pictures),
        "loose files": build_loose_loader(LooseFiles(loose, plain), batch_size).__iter__,
    }
    for number in (0, 1, 2):
        place = f"{number} loading" if number else "in process"
        loaders[f"shards, {place}"] = ShardBatches(open_shards(shards, plain, batch_size), batch_size, number)
        if has_litdata():
            from pipelines.benchmarks.litdata_loader import build_litdata_loader, write_litdata

            if not number:
                write_litdata(pictures, folder / "litdata")
            loaders[f"litdata, {place}"] = build_litdata_loader(folder / "litdata", plain, batch_size, number).__iter__
    loaders["loose files, rescaled"] = build_loose_loader(LooseFiles(loose, full), batch_size).__iter__
    rescaled = ShardBatches(open_shards(shards, full, batch_size), batch_size, 0)
    loaders["shards, rescaled"] = rescaled
    loaders["shards, rescaled, 2 loading"] = ShardBatches(rescaled.samples, batch_size, 2)
    loaders["crops alone"] = Crops(open_shards(shards, plain, batch_size), batch_size)
    loaders["crops alone, rescaled"] = Crops(rescaled.samples, batch_size)
    return [Case(name, loader) for name, loader in loaders.items()]


def decode_all(pictures: Sequence[bytes]) -> Iterable[Stamped]:
    """Decode and forget."""
    for picture in pictures:
        decode_image(picture, 100.0)
    return ()


class LooseFiles(Dataset[TrainItem]):
    """Pictures in files of their own, in another order each time they are all read."""

    def __init__(self, paths: Sequence[Path], config: DataConfig) -> None:
        self.paths, self.transform = list(paths), TrainTransform(config, CLASSES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> TrainItem:
        path = self.paths[number]
        return augmented({"__key__": path.stem, "jpg": path.read_bytes(), "json": FACTS}, self.transform, number)


def augmented(raw: dict[str, Any], transform: TrainTransform, number: int) -> TrainItem:
    """What ``TrainSamples`` makes of the members of a sample."""
    return transform(partial(_decode, raw), Draws(SEED, number))


def _decode(raw: dict[str, Any], needed_size: Any) -> Any:
    return decode_sample(raw, CLASSES, 100.0, needed_size=needed_size)


def open_shards(paths: Sequence[Path], config: DataConfig, batch_size: int) -> TrainSamples:
    """Our own reader, as training has it."""
    sizes = [int(path.stem.rsplit("-", 1)[1]) for path in paths]
    order = SampleOrder(sizes, seed=SEED, global_batch=batch_size, block=config.shuffle_block)
    return TrainSamples(order, list(paths).__getitem__, TrainTransform(config, CLASSES), CLASSES, config, SEED)


def build_loose_loader(data: LooseFiles, batch_size: int) -> Iterable[Stamped]:
    """All files once, in random order, in this process."""
    batches = torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED)).split(batch_size)
    return DataLoader(data, batch_sampler=[batch.tolist() for batch in batches], collate_fn=stamped)


class ShardBatches:
    """All samples of the shards once, as training reads them."""

    def __init__(self, samples: TrainSamples, batch_size: int, threads: int) -> None:
        number = samples.order.epoch_samples
        self.samples, self.threads = samples, threads
        self.plan = [list(range(start, min(number, start + batch_size))) for start in range(0, number, batch_size)]

    def __call__(self) -> Iterator[Stamped]:
        """The batches; all threads have this process's clock."""
        return ((batch, os.getpid(), 0.0) for batch in load_batches(self.samples, self.plan, self.threads))


class Crops:
    """What the device does with the batches, done by this process; they are loaded in the first turn."""

    def __init__(self, samples: TrainSamples, batch_size: int) -> None:
        self.crop_px, self.loader = samples.config.crop_px, ShardBatches(samples, batch_size, 0)
        self.batches: list[TrainBatch] = []

    def __call__(self) -> Iterator[Stamped]:
        """The crops, of all batches."""
        self.batches = self.batches or [batch for batch, _, _ in self.loader()]
        return ((batch.crops(self.crop_px, torch.device("cpu")), os.getpid(), 0.0) for batch in self.batches)


def loading_processes(number: int) -> dict[str, Any]:
    """What a DataLoader is told of its processes: they stay from turn to turn."""
    if not number:
        return {"num_workers": 0}
    stay = {"persistent_workers": True, "multiprocessing_context": "fork"}
    return {"num_workers": number, "prefetch_factor": PREFETCH, **stay}


def stamped(items: Sequence[TrainItem]) -> Stamped:
    """A batch with the clock of the process that made it."""
    return collate(items), os.getpid(), time.process_time()


def load_pictures(folder: Path | None, limit: int) -> list[bytes]:
    """The first JPEGs of a folder, or generated ones.

    Raises:
        InputError: there is none, or one that is not a usable picture.
    """
    if folder is None:
        drawn = [photograph_like(number) for number in range(min(limit, GENERATED))]
        return [drawn[number % len(drawn)] for number in range(limit)]
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    jpegs = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file())
    if not jpegs:
        raise InputError(f"{folder} has no JPEG (.jpg, .jpeg)")
    return [_read_picture(path) for path in jpegs[:limit]]


def _read_picture(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        decode_image(data, 100.0)
    except BadSample as bad:
        raise InputError(f"{path} cannot be measured with: {bad}") from bad
    return data


def photograph_like(number: int) -> bytes:
    """A JPEG of 500 x 375 pixels, quality 90, with about the bytes a photograph has: gradients, blots and grain."""
    source = np.random.default_rng(number)
    coarse = Image.fromarray(source.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    fine = Image.fromarray(source.integers(0, 256, (375, 500, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    buffer = io.BytesIO()
    Image.blend(coarse, fine, 0.3).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_loose(pictures: Sequence[bytes], folder: Path) -> list[Path]:
    """Every picture in a file."""
    folder.mkdir()
    paths = [folder / f"{number:06d}.jpg" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(picture)
    return paths


def write_shards(pictures: Sequence[bytes], folder: Path) -> list[Path]:
    """Shards ``START-SAMPLES.tar``."""
    folder.mkdir()
    paths = []
    for start in range(0, len(pictures), SHARD_PICTURES):
        part = pictures[start : start + SHARD_PICTURES]
        writer = ShardWriter(folder / f"{start:06d}-{len(part)}.tar")
        for number, picture in enumerate(part, start):
            writer.write(encode_sample(f"{number:06d}", picture, "jpg", json.loads(FACTS)), CLASSES)
        writer.close()
        paths.append(writer.path)
    return paths
