"""``afa review apply``: a label set and what people decided about it become a shard set.

    accept              picture, tags and mask
    fix, with a mask    picture, the corrected mask, and the tags that it shows
    fix, without        left out: it waits for its mask
    reject              left out

What nobody decided about is left out too, unless ``--undecided`` says otherwise. Everything is checked before anything
is written; ``dataset.json`` comes last and says what the set was made from.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from afa_core.data.sample import BadSample
from afa_core.data.shards import DatasetIndex, file_sha256, save_dataset_index
from pipelines.cli import stage_main
from pipelines.decisions import Decision, Decisions, corrected_mask, named_run
from pipelines.errors import UsageError
from pipelines.label_pictures import LabelledPicture, labelled_pictures
from pipelines.label_set import CommittedUnit, check_apart, committed_units, find_run, load_run
from pipelines.label_sources import absolute_source
from pipelines.scratch_table import ScratchTable
from pipelines.shard_folder import prepare_output
from pipelines.shard_sources import mask_tags, split_of
from pipelines.supervised_shards import SupervisedShards

UNDECIDED = ("drop", "tags", "accept")
NAMED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands and options of ``afa review``."""
    actions = parser.add_subparsers(dest="action", required=True)
    apply = actions.add_parser("apply", help="write what was decided as a shard set")
    apply.add_argument("labels", metavar="LABELSET", help="folder or s3:// prefix of a label set, or of one run in it")
    apply.add_argument("--decisions", type=Path, required=True, help="table of decisions, as the report's review.csv")
    apply.add_argument("--output", type=Path, required=True, help="folder of the shard set")
    apply.add_argument("--run", help="name of the run (default: the one that the table names, else the newest)")
    apply.add_argument(
        "--undecided",
        choices=UNDECIDED,
        default="drop",
        help="labels without a decision: left out, packed without a mask, or accepted (default: drop)",
    )
    apply.add_argument("--val-share", type=float, default=0.0, help="share of the validation split (default: 0)")
    apply.add_argument("--samples-per-shard", type=int, default=500, help="(default: 500)")
    apply.add_argument("--overwrite", action="store_true", help="replace the shard set that is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the shard set; prints what became of the labels."""
    if arguments.samples_per_shard < 1:
        raise UsageError(f"--samples-per-shard {arguments.samples_per_shard}: must be at least 1")
    if not 0 <= arguments.val_share < 1:
        raise UsageError(f"--val-share {arguments.val_share}: must lie between 0 and 1")
    check_apart(str(arguments.output), arguments.labels)
    run_uri = find_run(absolute_source(arguments.labels), arguments.run or named_run(arguments.decisions))
    with (
        tempfile.TemporaryDirectory(prefix="afa-review-") as scratch,
        ScratchTable(Path(scratch), "decisions") as table,
    ):
        review = Review(run_uri, Decisions(arguments.decisions, table), arguments.undecided)
        review.check()
        output = arguments.output.absolute()
        prepare_output(output, overwrite=arguments.overwrite)
        shards = SupervisedShards(output, review.classes, arguments.samples_per_shard)
        index = review.write(shards, arguments.val_share)
    print(review.summary())
    if not index.splits:
        raise UsageError("nothing is left to pack: no shard set was written")
    save_dataset_index(output, dataclasses.replace(index, lineage=review.lineage()))
    print(f"shard set {output}")
    return 0


class Review:
    """A run, the decisions about it, and what became of its labels."""

    def __init__(self, run_uri: str, decisions: Decisions, undecided: str) -> None:
        self.run, self.decisions, self.undecided = run_uri, decisions, undecided
        self.name = run_uri.rsplit("/", 1)[1]
        self.record = load_run(run_uri)
        self.classes = tuple(self.record["classes"])
        self.outcome: Counter[str] = Counter()
        self.waiting: list[str] = []
        self.lost: list[str] = []

    def check(self) -> None:
        """Read the decisions and see that they fit the labels.

        Raises:
            InputError, UsageError: they do not.
        """
        identity = {name: str(self.record[name]) for name in ("model_digest", "config_digest")}
        self.decisions.load({"run": self.name, **identity})
        self.decisions.check_labels(self.run, self.classes, self._max_megapixels)

    def write(self, shards: SupervisedShards, val_share: float) -> DatasetIndex:
        """Write every sample that is to be packed; the index of the set."""
        for unit in tqdm(committed_units(self.run), unit=" units", mininterval=10.0):
            keep = dict(self._keep(unit))
            for item in labelled_pictures(unit, set(keep)):
                key, decision = item.row["key"], keep[item.row["key"]]
                if item.picture is None:
                    self._name(self.lost, "lost", f"{key} ({item.problem})")
                    continue
                mask = self._mask(item, decision)
                tags = self._tags(item, decision, mask)
                facts = self._facts(item, decision)
                shards.write(split_of(key, val_share), key, item.picture, item.extension, tags, facts, mask)
                self.outcome[_outcome(decision, self.undecided)] += 1
        return shards.close()

    def lineage(self) -> dict[str, Any]:
        """What the shard set was made from."""
        return {
            "kind": "review",
            "label_set": self.run.rsplit("/", 1)[0],
            "run": self.name,
            **{name: self.record[name] for name in ("input", "model", "model_digest", "config_digest")},
            "decisions": {
                "file": self.decisions.path.name,
                "sha256": file_sha256(self.decisions.path),
                **self.decisions.counts,
            },
            "undecided": self.undecided,
            "outcome": dict(self.outcome),
        }

    def summary(self) -> str:
        """What became of the labels."""
        lines = [f"{count:9d}  {name.replace('_', ' ')}" for name, count in sorted(self.outcome.items())]
        for words, keys in (("waiting for a corrected mask", self.waiting), ("pictures that cannot be had", self.lost)):
            if keys:
                lines.append(f"{words}, the first: {', '.join(keys)}")
        return "\n".join(lines)

    def _keep(self, unit: CommittedUnit) -> Iterator[tuple[str, Decision | None]]:
        """The labels of a unit that are to be packed; the others are counted."""
        keys = [row["key"] for row in unit.rows if row["status"] == "ok"]
        decided = self.decisions.of(keys)
        for key in keys:
            decision = decided.get(key)
            if decision is None and self.undecided == "drop":
                self.outcome["undecided_left_out"] += 1
            elif decision and decision.choice == "reject":
                self.outcome["rejected"] += 1
            elif decision and decision.choice == "fix" and not decision.mask:
                self._name(self.waiting, "waiting_for_mask", key)
            else:
                yield key, decision

    def _name(self, named: list[str], outcome: str, words: str) -> None:
        self.outcome[outcome] += 1
        if len(named) < NAMED:
            named.append(words)

    def _mask(self, item: LabelledPicture, decision: Decision | None) -> bytes | None:
        if decision is None and self.undecided == "tags":
            return None
        if decision is None or not decision.mask:
            return item.mask_png
        size = (item.row["height"], item.row["width"])
        return corrected_mask(decision.mask, size, self.classes, self._max_megapixels)

    def _tags(self, item: LabelledPicture, decision: Decision | None, mask: bytes | None) -> list[str]:
        """Given tags stay; where a person corrected the mask, or the model guessed the tags, the mask knows better."""
        corrected = decision is not None and bool(decision.mask)
        if mask is None or (item.row["tags_source"] == "given" and not corrected):
            return list(item.row["tags"])
        try:
            return list(mask_tags(mask, self.classes))
        except BadSample as bad:
            raise UsageError(f"the mask of {item.row['key']} is damaged ({bad}): afa verify-labels tells more") from bad

    def _facts(self, item: LabelledPicture, decision: Decision | None) -> dict[str, Any]:
        review = {"decision": decision.choice if decision else "undecided", "run": self.name}
        if decision and decision.note:
            review["note"] = decision.note
        row = item.row
        return {"width": row["width"], "height": row["height"], "source": row["uri"], "review": review}

    @property
    def _max_megapixels(self) -> float:
        return float(self.record["label_config"]["max_megapixels"])


def _outcome(decision: Decision | None, undecided: str) -> str:
    if decision is not None:
        return "corrected" if decision.mask else "accepted"
    return "undecided_tags" if undecided == "tags" else "undecided_accepted"


if __name__ == "__main__":
    sys.exit(stage_main(add_arguments, run))
