"""``afa report``: one page about a label set - totals, charts, a gallery, and decisions to take.

The rows are streamed once: everything that is shown of all of them is a counter, what is shown of single pictures is a
sample. Only the pictures and masks of that sample are read.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infra.object_store import find_object, join, write_object
from pipelines.cli import stage_main
from pipelines.errors import UsageError
from pipelines.inventory import list_generations
from pipelines.label_set import check_apart, committed_units, find_run, list_runs, load_run
from pipelines.label_sources import absolute_source
from pipelines.reporting import sections
from pipelines.reporting.cards import load_cards
from pipelines.reporting.changes import EarlierLabels
from pipelines.reporting.choice import Choice
from pipelines.reporting.html import build_page
from pipelines.reporting.numbers import DOUBTS, Numbers
from pipelines.reporting.sections import Earlier
from pipelines.reporting.throughput import Throughput
from pipelines.scratch_table import ScratchTable

MAX_GALLERY = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``afa report``."""
    parser.add_argument("labels", metavar="LABELSET", help="folder or s3:// prefix of a label set, or of one run in it")
    parser.add_argument("--run", help="name of the run (default: the newest)")
    parser.add_argument("--against", help="earlier run to compare with (default: the one before, of the same input)")
    parser.add_argument("--output", default="report.html", help="the page, a file or s3:// URI (default: report.html)")
    parser.add_argument("--gallery", type=int, default=200, help="labels shown at most (default: 200)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; prints what is in it."""
    if not 0 <= arguments.gallery <= MAX_GALLERY:
        raise UsageError(f"--gallery {arguments.gallery}: must lie between 0 and {MAX_GALLERY}")
    check_apart(arguments.output, arguments.labels)
    labels, output = absolute_source(arguments.labels), absolute_source(arguments.output)
    if Path(output).is_dir():
        raise UsageError(f"--output {output} is a folder: name a file, as {output}/report.html")
    run_uri = find_run(labels, arguments.run)
    earlier_uri = find_earlier(run_uri, arguments.against)
    survey = Survey(run_uri, earlier_uri, arguments.gallery)
    page, shown = survey.page(arguments.labels)
    write_object(output, page)
    counts = survey.numbers.counts
    print(f"images {counts.images}  labels {counts.labels}  quarantined {counts.quarantined}")
    print(f"run {name_of(run_uri)}, compared with {name_of(earlier_uri) if earlier_uri else 'nothing'}")
    print(f"page {output}: {len(page) / 1e6:.1f} MB, {shown} of {counts.labels} labels in its gallery")
    return 0


def find_earlier(run_uri: str, name: str | None) -> str | None:
    """The run to compare with: the named one, else the newest before this one that has the same input.

    Raises:
        UsageError: the named one is not there, or is the run itself.
    """
    label_set, own = run_uri.rsplit("/", 1)
    if name == own:
        raise UsageError(f"--against {name} is the run that is reported: name another one")
    if name is not None:
        if find_object(join(label_set, f"{name}/run.json")) is None:
            raise UsageError(f"--against {name}: {label_set} has no such run")
        return join(label_set, name)
    record = load_run(run_uri)
    before = {}
    for uri in list_runs(label_set):
        other = load_run(uri)
        if other["input"] == record["input"] and other["created"] < record["created"]:
            before[uri] = other["created"]
    return max(before, key=lambda uri: before[uri], default=None)


class Survey:
    """What one pass over the rows of a run, and one over those of an earlier run, find."""

    def __init__(self, run_uri: str, earlier_uri: str | None, gallery: int) -> None:
        self.run, self.record = run_uri, load_run(run_uri)
        self.numbers = Numbers(self.record["classes"])
        self.throughput = Throughput()
        self.choice = Choice(gallery)
        self.committed = 0
        self.earlier: Earlier | None = None
        with tempfile.TemporaryDirectory(prefix="afa-report-") as scratch, ExitStack() as stack:
            labels = None
            if earlier_uri:
                labels = EarlierLabels(stack.enter_context(ScratchTable(Path(scratch), "earlier")))
                self.earlier = self._read_earlier(earlier_uri, labels)
            for unit in tqdm(committed_units(run_uri), desc="rows", unit=" units", mininterval=interval_s()):
                self.committed += 1
                self.throughput.add(unit.marker)
                self.choice.add(unit, labels.compare(unit.rows) if labels else {})
                for row in unit.rows:
                    self.numbers.add(row)

    def _read_earlier(self, uri: str, labels: EarlierLabels) -> Earlier:
        record = load_run(uri)
        numbers = Numbers(record["classes"])
        for unit in tqdm(committed_units(uri), desc="earlier", unit=" units", mininterval=interval_s()):
            labels.keep(unit.rows)
            for row in unit.rows:
                numbers.add(row)
        return Earlier(name_of(uri), record, numbers, labels.changes)

    def page(self, labels: str) -> tuple[bytes, int]:
        """The page, and how many labels its gallery shows.

        Args:
            labels: how the user names the label set.
        """
        curve = self.throughput.curve()
        planned = sum(generation.units for generation in list_generations(self.run))
        chosen = self.choice.chosen()
        parts = {
            "heading": escape(name_of(self.run)),
            "about": sections.about(self.record, self.earlier),
            "totals": sections.totals(self.numbers, curve, self.committed, planned),
            "time": sections.times(self.throughput, curve),
            "classes": sections.classes(self.numbers, self.record["classes"], self.earlier),
            "doubt": sections.doubt(self.numbers, self.earlier),
            "gallery": self._gallery_words(len(chosen)),
            "quarantined": sections.quarantined(self.numbers),
            "footer": escape(f"model {self.record['model_digest']}, configuration {self.record['config_digest']}"),
        }
        cards = load_cards(self.run, chosen, self.record["label_config"]["max_megapixels"])
        return build_page(f"Labels {name_of(self.run)}", parts, self._data(labels), cards)

    def _gallery_words(self, chosen: int) -> str:
        labels = self.numbers.counts.labels
        if not labels:
            return "<p>There are no labels.</p>"
        if chosen == labels:
            return "<p>Every label.</p>"
        return (
            f"<p>A sample of the {labels:,} labels: the most uncertain ones, as many drawn at random, and every class"
            " that occurs.</p>"
        )

    def _data(self, labels: str) -> dict[str, Any]:
        """What the page's script needs beside the cards."""
        record, name = self.record, name_of(self.run)
        words = ["afa", "review", "apply", labels, "--run", name, "--decisions", "review.csv", "--output", "SHARDS"]
        return {
            "run": {"name": name, "model_digest": record["model_digest"], "config_digest": record["config_digest"]},
            "classes": [[tag, sections.colour(index)] for index, tag in enumerate(record["classes"], start=1)],
            "doubts": DOUBTS,
            "labels": self.numbers.counts.labels,
            "command": shlex.join(words),
        }


def name_of(run_uri: str) -> str:
    """Name of a run."""
    return run_uri.rsplit("/", 1)[1]


def interval_s() -> float:
    """How often a bar is drawn: rarely where nobody looks on."""
    return 0.5 if sys.stderr.isatty() else 10.0


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
