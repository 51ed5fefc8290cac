"""``afa bench``: how fast the step, its parts, the labelling job and the loader are on this machine.

Compared cases run in turns in one call, each in a process of its own. Ratios hold from machine to machine, times do
not. ``afa bench compare`` holds one result file against another.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from afa_core.backbone import kernels
from pipelines.benchmarks.results import compare, ratios, save, table
from pipelines.cli import stage_main
from pipelines.errors import UsageError

# Benchmark -> what it measures. Each is a module of pipelines.benchmarks with add_arguments and run.
BENCHMARKS = {
    "step": "a training iteration against its plain form",
    "cam": "multi-scale class activation maps against their plain form",
    "par": "the refinement of a training step against its plain form",
    "label": "the labelling job against a bare loop over pictures in memory",
    "loader": "reading and augmenting samples against the bare decoder",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa bench``."""
    kinds = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name, summary in BENCHMARKS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        _module(name).add_arguments(kind)
        kind.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    kind = kinds.add_parser("compare", help="one result file against another")
    kind.add_argument("before", type=Path)
    kind.add_argument("after", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Measure, or compare."""
    if arguments.benchmark == "compare":
        print(compare(arguments.before, arguments.after))
        return 0
    if arguments.json:
        _check_writable(arguments.json)
    from pipelines.benchmarks.machine import describe_machine, roofline

    machine: dict[str, Any] = describe_machine()
    roof = roofline(kernels.best_device())
    machine["roofline"] = roof
    print("  ".join(f"{name} {value}" for name, value in machine.items() if name != "roofline"))
    print(
        f"copies {roof['bytes_per_s'] / 1e9:.1f} GB/s  products {roof['operations_per_s'] / 1e9:.0f} GFLOP/s",
        flush=True,
    )
    measurements = _module(arguments.benchmark).run(arguments)
    print(table(measurements, roof))
    for line in ratios(measurements):
        print(line)
    if arguments.json:
        hidden = {"benchmark", "json", "stage", "run_stage"}
        settings = {name: value for name, value in vars(arguments).items() if name not in hidden}
        save(arguments.json, arguments.benchmark, settings, machine, measurements)
    return 0


def _check_writable(path: Path) -> None:
    """Fail before minutes of measuring, not behind them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("a").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from error


def _module(name: str) -> Any:
    return importlib.import_module(f"pipelines.benchmarks.{name}")


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
