"""What a cluster would do: a calculator for docs/scaling.md.

    python tests/benchmarks/scaling_model.py                                   # the tables of the document
    python tests/benchmarks/scaling_model.py --set gpu_step_s=0.6 label_gpu_images_per_s=25
    python tests/benchmarks/scaling_model.py --assumptions mine.yaml

Every input is a field of ``Assumptions`` with its unit in its name: ``measured`` (or counted) here on two CPU cores, a
``setting`` of this project, or ``assumed`` from public specifications and prices: no GPU was to be had.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

GPUS = (8, 64, 512)
PICTURES = (10**6, 10**9)


def measured(value: float, what: str) -> Any:
    """An input that was measured or counted here."""
    return field(default=value, metadata={"source": "measured", "what": what})


def setting(value: float, what: str) -> Any:
    """A default of this project."""
    return field(default=value, metadata={"source": "setting", "what": what})


def assumed(value: float, what: str) -> Any:
    """An input that stands for a machine we do not have."""
    return field(default=value, metadata={"source": "assumed", "what": what})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """The inputs of the model."""

    # Training.
    parameters: float = measured(13.69e6, "mit_b1 with 20 classes; a gradient has 4 bytes for each")
    checkpoint_bytes_per_parameter: float = measured(12, "weights and AdamW's two moments, float32")
    checkpoint_write_bytes_per_s: float = measured(400e6, "rank 0 serialises into a local file; all wait")
    job_start_s: float = measured(18, "start of a run's workers, and of their successors")
    gpu_step_s: float = assumed(0.4, "forward, three-scale CAM, PAR, backward; the published log has 1.66 s in 2021")
    images_per_gpu_step: float = assumed(2, "crops of 512 pixels, as published")
    step_spread: float = assumed(0.03, "standard deviation of a step's time over workers, share of it")
    gpus_per_node: float = assumed(8, "")
    node_bus_bytes_per_s: float = assumed(200e9, "all-reduce inside a node (NVLink)")
    network_bytes_per_s: float = assumed(8e9, "all-reduce between nodes: 100 Gbit/s, two thirds of it")
    hop_s: float = assumed(30e-6, "latency between two nodes, with NCCL's start")
    blocking_collectives: float = measured(4, "small all-reduces a step that nothing hides: SyncBatchNorm, losses")
    overlap: float = assumed(0.5, "share of the gradient's all-reduce behind the backward pass")
    checkpoint_every_steps: float = setting(500, "train.checkpoint_every's default")
    upload_bytes_per_s: float = assumed(200e6, "one stream to S3")
    gpu_life_h: float = assumed(50_000, "between failures, on demand (Llama 3's log: 419 on 16,384 GPUs in 54 days)")
    spot_node_life_h: float = assumed(24, "between interruptions of a spot machine")
    # Storage.
    picture_bytes: float = assumed(110e3, "a photograph of 500 x 375 pixels (VOC)")
    pictures_per_shard: float = setting(500, "--samples-per-shard's default")
    store_bytes_per_s: float = assumed(100e9, "what a bucket gives a cluster in all; ask for more than the default")
    shard_entry_bytes: float = measured(200, "of dataset.json, for every shard")
    prefix_gets_per_s: float = assumed(5500, "S3: of a prefix; a bucket splits a busy prefix by itself, in minutes")
    prefix_puts_per_s: float = assumed(3500, "S3: of a prefix")
    page_keys: float = assumed(1000, "keys an S3 listing request answers with")
    page_s: float = assumed(0.1, "a listing request")
    listing_threads: float = setting(16, "infra.object_store.LISTING_THREADS; a flat prefix has one")
    # Labelling.
    unit_pictures: float = setting(64, "--unit-size's default")
    label_gpu_images_per_s: float = assumed(40, "one GPU, three scales, affinity, PAR; not measured on one")
    inventory_bytes_per_picture: float = measured(88, "docs/performance.md: 83.7 MiB for 1,000,000")
    scratch_bytes_per_picture: float = measured(147, "the driver's SQLite file while it sorts a listing")
    inventory_s_per_picture: float = measured(22.3e-6, "docs/performance.md: sorting and writing, one process")
    manifest_bytes_per_picture: float = measured(143, "64 rows a file (tests/generated_labels.py)")
    marker_bytes: float = measured(396, "a unit")
    mask_bytes_per_picture: float = assumed(12e3, "indexed PNG and JSON of 500 x 375 pixels, tar headers")
    requests_per_unit: float = measured(4, "PUT of tar, manifest and marker; HEAD of the marker")
    driver_s_per_unit: float = measured(30e-6, "tests/benchmarks/scheduling.py model, all phases")
    block_s: float = measured(0.01, "of the driver's time for a block on Ray Data")
    block_units: float = setting(16, "pipelines.label_windows.BLOCK_UNITS")
    blocks_per_worker: float = setting(64, "pipelines.label_windows.BLOCKS_PER_WORKER")
    most_blocks: float = setting(4096, "pipelines.label_windows.MAX_BLOCKS")
    worker_start_s: float = assumed(30, "of a window's actors: process, libraries, model onto the GPU")
    # Prices.
    gpu_hour_usd: float = assumed(2.5, "one GPU of the H100 class, a share of its machine")
    put_usd: float = assumed(5e-6, "S3 standard: PUT and LIST")
    get_usd: float = assumed(4e-7, "S3 standard: GET and HEAD")
    month_byte_usd: float = assumed(0.023e-9, "S3 standard: a byte for a month")


@dataclass(frozen=True)
class Training:
    """A step and an hour of training on so many GPUs."""

    gpus: int
    a: Assumptions

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.a.gpus_per_node)

    @property
    def gradient_bytes(self) -> float:
        return 4 * self.a.parameters

    @property
    def all_reduce_s(self) -> float:
        """Ring inside a node, then between nodes: 2 (N - 1) / N of the bytes over each; a tree's latency."""
        local = min(self.gpus, self.a.gpus_per_node)
        inside_s = 2 * (local - 1) / local * self.gradient_bytes / self.a.node_bus_bytes_per_s
        between_s = 2 * (self.nodes - 1) / self.nodes * self.gradient_bytes / self.a.network_bytes_per_s
        return inside_s + between_s + self.latency_s

    @property
    def latency_s(self) -> float:
        return 2 * math.log2(self.nodes) * self.a.hop_s if self.nodes > 1 else self.a.hop_s

    @property
    def compute_s(self) -> float:
        """The slowest of N: mean and sqrt(2 ln N) deviations."""
        return self.a.gpu_step_s * (1 + self.a.step_spread * math.sqrt(2 * math.log(self.gpus)))

    @property
    def step_s(self) -> float:
        bare = (1 - self.a.overlap) * self.all_reduce_s + self.a.blocking_collectives * self.latency_s
        needs_s = self.gpus * self.a.images_per_gpu_step * self.a.picture_bytes / self.a.store_bytes_per_s
        return max(self.compute_s + bare, needs_s)

    @property
    def efficiency(self) -> float:
        return self.a.gpu_step_s / self.step_s

    @property
    def images_per_s(self) -> float:
        return self.gpus * self.a.images_per_gpu_step / self.step_s

    @property
    def interval_s(self) -> float:
        return self.a.checkpoint_every_steps * self.step_s

    @property
    def checkpoint_bytes(self) -> float:
        return self.a.checkpoint_bytes_per_parameter * self.a.parameters

    @property
    def checkpoint_share(self) -> float:
        """Everybody waits for rank 0's file; the upload is waited for only where it takes longer than an interval."""
        write_s = self.checkpoint_bytes / self.a.checkpoint_write_bytes_per_s
        upload_s = max(0.0, self.checkpoint_bytes / self.a.upload_bytes_per_s - self.interval_s)
        return (write_s + upload_s) / (self.interval_s + write_s + upload_s)

    def lost_share(self, failures_per_h: float) -> float:
        """Half an interval and a new start for every failure."""
        return min(1.0, failures_per_h * (self.interval_s / 2 + self.a.job_start_s) / 3600)


@dataclass(frozen=True)
class Labelling:
    """Labelling so many pictures on so many GPUs."""

    pictures: int
    gpus: int
    a: Assumptions

    @property
    def units(self) -> int:
        return math.ceil(self.pictures / self.a.unit_pictures)

    @property
    def shards(self) -> int:
        return math.ceil(self.pictures / self.a.pictures_per_shard)

    @property
    def list_store_s(self) -> float:
        return self.pictures / self.a.page_keys * self.a.page_s / self.a.listing_threads

    @property
    def list_shards_s(self) -> float:
        """One flat prefix."""
        return self.shards / self.a.page_keys * self.a.page_s

    @property
    def list_labels_s(self) -> float:
        """Three files a unit in one flat prefix, whose pages come one after the other."""
        return 3 * self.units / self.a.page_keys * self.a.page_s

    @property
    def window_units(self) -> float:
        return self.a.block_units * max(self.a.most_blocks, self.a.blocks_per_worker * self.gpus)

    @property
    def windows(self) -> int:
        return math.ceil(self.units / self.window_units)

    @property
    def block_count(self) -> float:
        return min(self.units, max(self.windows * self.a.most_blocks, self.units / self.a.block_units))

    @property
    def label_s(self) -> float:
        """Compute or the driver, the slower of them; for each window its workers' start and half a block."""
        compute_s = self.pictures / (self.gpus * self.a.label_gpu_images_per_s)
        tail_s = compute_s / self.block_count * self.gpus / 2
        return max(compute_s, self.block_count * self.a.block_s) + self.windows * (self.a.worker_start_s + tail_s)

    @property
    def efficiency(self) -> float:
        return self.gpu_hours_of_labels / (self.gpus * self.label_s / 3600)

    @property
    def gpu_hours_of_labels(self) -> float:
        return self.pictures / self.a.label_gpu_images_per_s / 3600

    @property
    def alone_s(self) -> float:
        """What one process does while no GPU works: listing, inventory, plan, leftovers."""
        inventory_s = self.pictures * self.a.inventory_s_per_picture
        return max(self.list_store_s, inventory_s) + self.units * self.a.driver_s_per_unit + self.list_labels_s

    @property
    def images_per_s(self) -> float:
        return self.pictures / self.label_s

    @property
    def puts_per_s(self) -> float:
        return self.images_per_s / self.a.unit_pictures * (self.a.requests_per_unit - 1)

    @property
    def requests_usd(self) -> float:
        """For the store's listing, a GET a picture, and each unit's files."""
        pages = (self.pictures + 3 * self.units) / self.a.page_keys
        writes = self.units * (self.a.requests_per_unit - 1)
        return (pages + writes) * self.a.put_usd + (self.pictures + self.units) * self.a.get_usd

    @property
    def label_bytes(self) -> float:
        per_unit = self.units * self.a.marker_bytes
        return self.pictures * (self.a.mask_bytes_per_picture + self.a.manifest_bytes_per_picture) + per_unit

    @property
    def gpu_usd(self) -> float:
        return self.gpus * self.label_s / 3600 * self.a.gpu_hour_usd

    def per_million(self, usd: float) -> float:
        return usd / (self.pictures / 1e6)


Row = tuple[str, Callable[[Any], str]]

TRAINING_ROWS: Sequence[Row] = (
    ("nodes", lambda t: f"{t.nodes}"),
    ("compute, slowest worker", lambda t: seconds(t.compute_s)),
    ("all-reduce of the gradient", lambda t: seconds(t.all_reduce_s)),
    ("step", lambda t: seconds(t.step_s)),
    ("efficiency", lambda t: share(t.efficiency)),
    ("pictures a second", lambda t: f"{t.images_per_s:,.0f}"),
    ("read from the store", lambda t: f"{size(t.images_per_s * t.a.picture_bytes)}/s"),
    ("checkpoint", lambda t: size(t.checkpoint_bytes)),
    ("checkpoint interval", lambda t: seconds(t.interval_s)),
    ("waiting for checkpoints", lambda t: share(t.checkpoint_share)),
    ("lost to failures, on demand", lambda t: share(t.lost_share(t.gpus / t.a.gpu_life_h))),
    ("lost to interruptions, all spot", lambda t: share(t.lost_share(t.nodes / t.a.spot_node_life_h))),
    ("a GPU-day in pictures", lambda t: f"{t.images_per_s * 86400 / t.gpus:,.0f}"),
)
STORE_ROWS: Sequence[Row] = (
    ("pictures", lambda s: size(s.pictures * s.a.picture_bytes)),
    ("shards of 500", lambda s: f"{s.shards:,}"),
    ("their index, dataset.json", lambda s: size(s.shards * s.a.shard_entry_bytes)),
    ("listing the shards", lambda s: seconds(s.list_shards_s)),
    ("listing the pictures, 16 prefixes at a time", lambda s: seconds(s.list_store_s)),
    ("scratch disk for the inventory", lambda s: size(s.pictures * s.a.scratch_bytes_per_picture)),
    ("inventory, one process", lambda s: seconds(s.pictures * s.a.inventory_s_per_picture)),
    ("inventory", lambda s: size(s.pictures * s.a.inventory_bytes_per_picture)),
    ("units, and as many markers", lambda s: f"{s.units:,}"),
    ("markers", lambda s: size(s.units * s.a.marker_bytes)),
    ("manifests", lambda s: size(s.pictures * s.a.manifest_bytes_per_picture)),
    ("masks", lambda s: size(s.pictures * s.a.mask_bytes_per_picture)),
    ("listing the markers and their files", lambda s: seconds(s.list_labels_s)),
    ("driver's own work on units", lambda s: seconds(s.units * s.a.driver_s_per_unit)),
    ("requests, a million pictures", lambda s: usd(s.per_million(s.requests_usd))),
    (
        "keeping the labels, a million pictures and month",
        lambda s: usd(s.per_million(s.label_bytes * s.a.month_byte_usd)),
    ),
)
LABELLING_ROWS: Sequence[Row] = (
    ("windows", lambda s: f"{s.windows}"),
    ("labelling", lambda s: seconds(s.label_s)),
    ("efficiency", lambda s: share(s.efficiency)),
    ("before and after, GPUs idle or released", lambda s: seconds(s.alone_s)),
    ("GPU hours", lambda s: f"{s.gpus * s.label_s / 3600:,.0f}"),
    ("read from the store", lambda s: f"{size(s.images_per_s * s.a.picture_bytes)}/s"),
    ("GETs a second, pictures one by one", lambda s: f"{s.images_per_s:,.0f}"),
    ("prefixes that they need", lambda s: f"{math.ceil(s.images_per_s / s.a.prefix_gets_per_s)}"),
    ("PUTs a second, into one prefix", lambda s: f"{s.puts_per_s:,.0f} of {s.a.prefix_puts_per_s:,.0f}"),
    ("GPUs, a million pictures", lambda s: usd(s.per_million(s.gpu_usd))),
    ("all, a million pictures", lambda s: usd(s.per_million(s.gpu_usd + s.requests_usd))),
)


def tables(assumptions: Assumptions) -> str:
    """Every table of the document that is not a measurement, in Markdown."""
    parts = [
        ("Assumptions", assumption_table(assumptions)),
        ("Training", table("GPUs", TRAINING_ROWS, {f"{n}": Training(n, assumptions) for n in GPUS})),
        ("The store", table("pictures", STORE_ROWS, {f"{n:,}": Labelling(n, GPUS[0], assumptions) for n in PICTURES})),
    ]
    for pictures in PICTURES:
        columns = {f"{gpus} GPUs": Labelling(pictures, gpus, assumptions) for gpus in GPUS}
        parts.append((f"Labelling {pictures:,} pictures", table("", LABELLING_ROWS, columns)))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts)


def assumption_table(assumptions: Assumptions) -> str:
    """Name, value, where it comes from."""
    lines = ["| input | value | | what |", "| --- | --- | --- | --- |"]
    for item in fields(assumptions):
        value = getattr(assumptions, item.name)
        source = item.metadata["source"] if value == item.default else "yours"
        lines.append(f"| `{item.name}` | {value:,.6g} | {source} | {item.metadata['what']} |".replace("|  |", "| |"))
    return "\n".join(lines)


def table(corner: str, rows: Sequence[Row], columns: dict[str, Any]) -> str:
    """Markdown: a row a quantity, a column a case."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | {' | '.join(show(case) for case in columns.values())} |" for name, show in rows]
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time for people."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if value >= 2 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def size(value: float) -> str:
    """Bytes for people."""
    for unit, length in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= length:
            return f"{value / length:.1f} {unit}"
    return f"{value / 1e3:.1f} kB"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def usd(value: float) -> str:
    return f"${value:.2f}"


def build_assumptions(changes: dict[str, Any]) -> Assumptions:
    """The defaults with changes.

    Raises:
        SystemExit: a name that is none, or no number.
    """
    known = {item.name for item in fields(Assumptions)}
    if unknown := sorted(changes.keys() - known):
        raise SystemExit(f"{unknown[0]} is no assumption: one of {', '.join(sorted(known))}")
    try:
        return replace(Assumptions(), **{name: float(value) for name, value in changes.items()})
    except (TypeError, ValueError) as error:
        raise SystemExit(f"assumptions are numbers: {error}") from error


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assumptions", type=Path, help="YAML of name: value")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="instead of single assumptions")
    arguments = parser.parse_args()
    changes = yaml.safe_load(arguments.assumptions.read_text()) or {} if arguments.assumptions else {}
    changes |= dict(change.partition("=")[::2] for change in arguments.set)
    print(tables(build_assumptions(changes)))


if __name__ == "__main__":
    main()
