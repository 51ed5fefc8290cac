"""Results of benchmarks: as a table, as a JSON file, and one file against another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt
from pydantic import AllowInfNan, TypeAdapter, ValidationError

from pipelines.benchmarks.measure import Measurement
from pipelines.errors import UsageError

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Case:
    name: str
    median_s: Annotated[float, Gt(0), AllowInfNan(False)]
    peak_mib: Annotated[float, AllowInfNan(False)] | None


@dataclasses.dataclass(frozen=True)
class _Record:
    """What ``compare`` reads of a file."""

    schema_version: Literal[1]
    settings: dict[str, Any]
    machine: dict[str, Any]
    measurements: list[_Case]


def table(measurements: Sequence[Measurement], roof: dict[str, float] | None) -> str:
    """A line a case; with a roofline also the share of it that the case reaches."""
    width = max(len(item.name) for item in measurements)
    lines = [f"{'case':{width}s}  seconds (median, min-max)     images/s   peak MiB   of bandwidth   of products"]
    for item in measurements:
        rate = f"{item.images_per_s:9.2f}" if item.images_per_s else f"{'-':>9s}"
        peak = f"{item.peak_mib:9.0f}" if item.peak_mib is not None else f"{'-':>9s}"
        shares = [
            f"{amount / item.median_s / roof[limit]:13.1%}" if roof and amount else f"{'-':>13s}"
            for amount, limit in ((item.moved_bytes, "bytes_per_s"), (item.operations, "operations_per_s"))
        ]
        spread = f"{item.median_s:9.4f} ({min(item.seconds):.4f}-{max(item.seconds):.4f})"
        lines.append(f"{item.name:{width}s}  {spread:28s} {rate}  {peak} {' '.join(shares)}")
        lines += [f"{'':{width}s}  {name}: {value}" for name, value in item.facts.items()]
    return "\n".join(lines)


def ratios(measurements: Sequence[Measurement]) -> list[str]:
    """Every case against the first of its group, the words before the last slash of its name."""
    first: dict[str, Measurement] = {}
    lines = []
    for item in measurements:
        base = first.setdefault(item.name.rpartition("/")[0], item)
        if base is item:
            continue
        faster = base.median_s / item.median_s
        if base.images_per_s and item.images_per_s:  # they may have had different numbers of pictures
            faster = item.images_per_s / base.images_per_s
        line = f"{item.name}: {faster:.2f} times as fast as {base.name}"
        if item.peak_mib and base.peak_mib:
            line += f", {item.peak_mib / base.peak_mib:.2f} of its peak memory"
        lines.append(line)
    return lines


def save(
    path: Path, benchmark: str, settings: dict[str, Any], machine: dict[str, Any], measurements: Sequence[Measurement]
) -> None:
    """Write a result file."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": benchmark,
        "settings": settings,
        "machine": machine,
        "measurements": [
            dataclasses.asdict(item) | {"median_s": item.median_s, "images_per_s": item.images_per_s}
            for item in measurements
        ],
    }
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def compare(before: Path, after: Path) -> str:
    """Cases that two result files share, and what differs between their machines and settings.

    Raises:
        UsageError: a file is missing or is no result, or the two share no case.
    """
    one, other = _load(before), _load(after)
    lines = [
        f"{part}.{name}: {old.get(name)} / {new.get(name)}"
        for part, old, new in (
            ("settings", one.settings, other.settings),
            ("machine", one.machine, other.machine),
        )
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    cases = {item.name: item for item in one.measurements}
    shared = [(cases[item.name], item) for item in other.measurements if item.name in cases]
    if not shared:
        raise UsageError(f"{before} and {after} have no case in common")
    width = max(len(item.name) for _, item in shared)
    for old, new in shared:
        line = f"{new.name:{width}s}  {old.median_s:.4f} s -> {new.median_s:.4f} s"
        line += f"  {old.median_s / new.median_s:.2f} times as fast"
        if old.peak_mib and new.peak_mib:
            line += f"  peak {old.peak_mib:.0f} -> {new.peak_mib:.0f} MiB"
        lines.append(line)
    return "\n".join(lines)


def _load(path: Path) -> _Record:
    try:
        return TypeAdapter(_Record).validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{path} is no result of afa bench --json: {place}: {first['msg']}") from error
