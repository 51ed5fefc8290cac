"""``afa export``: hand a label set to other tools.

Labels are streamed unit by unit with their pictures, each goes into the format's writer, and nothing but counters and
the first few names is held. What each format makes of background and ignored pixels stands in its module.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from afa_core.data.sample import BadSample
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.export_folder import unfinished_folder
from pipelines.export_formats.exporter import Exporter, ExportJob
from pipelines.inventory import list_generations
from pipelines.label_pictures import LabelledPicture, labelled_pictures
from pipelines.label_set import check_apart, committed_names, committed_units, count_rows, find_run, load_run
from pipelines.label_sources import absolute_source

# Format -> its class, in the module of this name in ``export_formats``.
FORMATS = {
    "coco": "CocoExporter",
    "voc": "VocExporter",
    "labelstudio": "LabelStudioExporter",
    "cvat": "CvatExporter",
    "fiftyone": "FiftyOneExporter",
    "webdataset": "WebDatasetExporter",
}
PICTURES_OPTIONAL = ("coco", "cvat")
SPLIT = ("voc", "webdataset")
NAMED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa export``."""
    parser.add_argument("labels", metavar="LABELSET", help="folder or s3:// prefix of a label set, or of one run in it")
    parser.add_argument("--format", required=True, choices=FORMATS, help="who is to read it")
    parser.add_argument("--output", required=True, metavar="DIR", help="local folder, new or empty")
    parser.add_argument("--run", help="name of the run (default: the newest)")
    parser.add_argument(
        "--without-pictures", action="store_true", help=f"only the masks ({', '.join(PICTURES_OPTIONAL)})"
    )
    parser.add_argument(
        "--val-share", type=float, help=f"share of the validation split ({', '.join(SPLIT)}; default: 0)"
    )
    parser.add_argument("--samples-per-shard", type=int, help="(webdataset; default: 500)")


def run(arguments: argparse.Namespace) -> int:
    """Export; prints what was written, what was left out and why, and what a reader needs to know."""
    check_options(arguments)
    exporter_class = load_exporter(arguments.format)
    check_apart(arguments.output, arguments.labels)
    run_uri = find_run(absolute_source(arguments.labels), arguments.run)
    labels = count_rows(run_uri).labels
    if not labels:
        raise UsageError(f"{run_uri} has no labels yet: nothing to export")
    exported = Exported()
    try:
        with unfinished_folder(arguments.output) as (folder, output):
            job = build_job(arguments, run_uri, folder=folder, output=output)
            exporter: Exporter = exporter_class(job)
            export_labels(run_uri, exporter, exported, labels)
            if not exported.labels:
                raise UsageError(f"{exported.words()}\nnone of the pictures can be had any more: nothing was exported")
            notes = exporter.close()
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(f"{arguments.output}.partial is unfinished; the same command starts anew") from None
    print("\n".join([exported.words(), *unlabelled(run_uri), *notes, f"{arguments.format} {output}"]))
    return 0


@dataclass
class Exported:
    """What became of labels."""

    labels: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def count(self, row: dict[str, Any]) -> None:
        """An exported label."""
        self.labels += 1
        self.classes.update(name for name, area in zip(row["tags"], row["area"], strict=True) if area)

    def lose(self, key: str, reason: str) -> None:
        """A label without its picture."""
        self.lost[reason] += 1
        if len(self.named) < NAMED:
            self.named.append(f"    {key}: {reason}")

    def words(self) -> str:
        """Lines for people."""
        left_out = self.lost.total()
        lines = [f"labels {self.labels + left_out}  exported {self.labels}  left out {left_out}"]
        lines += [f"  {count} with {name}" for name, count in self.classes.most_common()]
        lines += [f"  left out {count}: {reason}" for reason, count in sorted(self.lost.items())]
        lines += self.named
        return "\n".join(lines + [f"    ... and {left_out - len(self.named)} more"] * (left_out > len(self.named)))


def check_options(arguments: argparse.Namespace) -> None:
    """See that the options fit the format.

    Raises:
        UsageError: one does not.
    """
    if arguments.without_pictures and arguments.format not in PICTURES_OPTIONAL:
        raise UsageError(f"--without-pictures: {arguments.format} needs its pictures")
    if arguments.val_share is not None and arguments.format not in SPLIT:
        raise UsageError(f"--val-share: {arguments.format} has no splits, only {' and '.join(SPLIT)} have")
    if arguments.val_share is not None and not 0 <= arguments.val_share < 1:
        raise UsageError(f"--val-share {arguments.val_share}: must lie between 0 and 1")
    if arguments.samples_per_shard is not None and arguments.format != "webdataset":
        raise UsageError(f"--samples-per-shard: {arguments.format} has no shards, only webdataset has")
    if arguments.samples_per_shard is not None and arguments.samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard {arguments.samples_per_shard}: must be at least 1")


def load_exporter(name: str) -> type[Exporter]:
    """The class of a format.

    Raises:
        UsageError: a library that it writes with is not installed.
    """
    try:
        module = importlib.import_module(f"pipelines.export_formats.{name}")
    except ModuleNotFoundError as error:
        raise UsageError(f"--format {name} needs {error.name}: pip install 'afa-pipelines[export]'") from error
    exporter: type[Exporter] = getattr(module, FORMATS[name])
    return exporter


def build_job(arguments: argparse.Namespace, run_uri: str, **folders: Any) -> ExportJob:
    """Job from the run and the options."""
    record = load_run(run_uri)
    label_set, name = run_uri.rsplit("/", 1)
    return ExportJob(
        **folders,
        classes=tuple(record["classes"]),
        model=record["model"],
        model_digest=record["model_digest"],
        run=name,
        label_set=label_set,
        max_megapixels=float(record["label_config"]["max_megapixels"]),
        with_pictures=not arguments.without_pictures,
        val_share=arguments.val_share or 0.0,
        samples_per_shard=arguments.samples_per_shard or 500,
    )


def export_labels(run_uri: str, exporter: Exporter, exported: Exported, labels: int) -> None:
    """Hand every label of a run to the exporter, with a bar that shows labels/s and what was left out."""
    with tqdm(total=labels, unit="label", mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        for unit in committed_units(run_uri):
            for label in labelled_pictures(unit):
                export_label(exporter, label, exported)
                bar.set_postfix(left_out=exported.lost.total(), refresh=False)
                bar.update()


def export_label(exporter: Exporter, label: LabelledPicture, exported: Exported) -> None:
    """Write a label, or count why not."""
    if label.picture is None:
        exported.lose(label.row["key"], label.problem)
        return
    try:
        exporter.add(label)
    except BadSample as bad:
        exported.lose(label.row["key"], bad.reason)
        return
    exported.count(label.row)


def unlabelled(run_uri: str) -> list[str]:
    """A line about units that have no labels yet, if there are any."""
    units = sum(generation.units for generation in list_generations(run_uri))
    missing = units - sum(1 for _ in committed_names(run_uri))
    return [f"{missing} of {units} units are not labelled yet: afa label goes on with them"] if missing > 0 else []


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
