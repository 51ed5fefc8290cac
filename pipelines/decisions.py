"""What a review decided about labels: a table with a row for each decided label.

    key, decision                       required; decision is accept, reject or fix
    note, mask                          optional; mask: a corrected PNG for a fix, beside the table
    run, model_digest, config_digest    optional; where they are, they must be those of the run

A key may stand behind ``./``: spreadsheets then leave ``=1+1``, ``0007`` and ``1-2`` alone, and no key begins with a
dot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afa_core.classes import IGNORE_INDEX
from afa_core.data.sample import BadSample, decode_seg_label, encode_mask
from afa_core.errors import InputError
from infra.object_store import S3, ObjectError, join, read_object
from pipelines.errors import UsageError
from pipelines.label_set import committed_units
from pipelines.scratch_table import ScratchTable
from pipelines.tag_tables import table_records

CHOICES = ("accept", "reject", "fix")
IDENTITY = ("run", "model_digest", "config_digest")
LISTED_MISTAKES = 5


@dataclass(frozen=True)
class Decision:
    """One row of the table.

    Attributes:
        choice: of ``CHOICES``.
        row: its number in the table, the heading being the first.
        note: the reviewer's words.
        mask: URI of a corrected mask, or empty.
        labelled: whether the run has a label of the key.
    """

    choice: str
    row: int
    note: str = ""
    mask: str = ""
    labelled: bool = False


class Mistakes:
    """Wrong rows of a table: the first are named, all are counted."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._named: list[tuple[int, str]] = []

    def add(self, row: int, words: str) -> None:
        """One more."""
        self.count += 1
        if len(self._named) < LISTED_MISTAKES:
            self._named.append((row, words))

    def check(self) -> None:
        """See that there are none.

        Raises:
            UsageError: naming the first.
        """
        if self.count:
            named = [f"row {row}: {words}" for row, words in sorted(self._named)]
            more = [f"and {self.count - len(named)} more"] if self.count > len(named) else []
            raise UsageError(f"{self.path}: {'; '.join([*named, *more])}")


class Decisions:
    """The decisions of a table by key, on disk: a script may have decided about millions."""

    def __init__(self, path: Path, table: ScratchTable) -> None:
        self.path, self.table = path, table
        self.counts: Counter[str] = Counter()

    def load(self, identity: Mapping[str, str]) -> None:
        """Read the table.

        Args:
            identity: what the run's columns must say, if they are there.

        Raises:
            InputError: it cannot be read, or lacks a column.
            UsageError: rows are wrong or contradict each other.
        """
        mistakes = Mistakes(self.path)
        for number, record in enumerate(table_records(self.path), start=2):
            for column in ("key", "decision"):
                if column not in record:
                    raise InputError(f"{self.path} has no column {column!r}: it has {', '.join(record)}")
            wrong = [name for name in IDENTITY if record.get(name) and record[name] != identity[name]]
            decision = self._decision(record, number)
            if wrong:
                name = wrong[0]
                mistakes.add(number, f"{name} is {record[name]}, that of the labels is {identity[name]}")
            elif decision.choice not in CHOICES:
                mistakes.add(number, f"unknown decision {decision.choice!r}, must be {', '.join(CHOICES)}")
            elif decision.mask and decision.choice != "fix":
                mistakes.add(number, f"a mask belongs to a fix, not to {decision.choice}")
            else:
                self._keep(_key(record), decision, mistakes)
        mistakes.check()

    def check_labels(self, run: str, classes: tuple[str, ...], max_megapixels: float) -> None:
        """See that the run has a label of each key, and that corrected masks fit.

        Raises:
            UsageError: naming the first rows that are wrong.
        """
        mistakes = Mistakes(self.path)
        for unit in committed_units(run, ["status", "width", "height"]):
            sizes = {row["key"]: (row["height"], row["width"]) for row in unit.rows if row["status"] == "ok"}
            found = self.of(list(sizes))
            self.table.put((key, asdict(decision) | {"labelled": True}) for key, decision in found.items())
            for key, decision in found.items():
                try:
                    if decision.mask:
                        corrected_mask(decision.mask, sizes[key], classes, max_megapixels)
                except BadSample as bad:
                    mistakes.add(decision.row, f"mask {decision.mask}: {bad.detail}")
        for key, value in self.table.items():
            if not value["labelled"]:
                mistakes.add(value["row"], f"no label of {key!r}")
        mistakes.check()

    def of(self, keys: list[str]) -> dict[str, Decision]:
        """Decisions about some keys."""
        return {key: Decision(**value) for key, value in self.table.get(keys).items()}

    def _keep(self, key: str, decision: Decision, mistakes: Mistakes) -> None:
        earlier = self.of([key]).get(key)
        if earlier is None:
            self.table.put([(key, asdict(decision))])
            self.counts[decision.choice] += 1
        elif (earlier.choice, earlier.mask) != (decision.choice, decision.mask):
            mistakes.add(decision.row, f"{key!r} is {decision.choice} here and {earlier.choice} in row {earlier.row}")

    def _decision(self, record: Mapping[str, Any], row: int) -> Decision:
        mask = str(record.get("mask") or "").strip()
        if mask and not mask.startswith((S3, "/")):
            mask = join(str(self.path.absolute().parent), mask)
        return Decision(str(record["decision"] or "").strip().lower(), row, str(record.get("note") or ""), mask)


def named_run(path: Path) -> str | None:
    """Name of the run that a table of decisions says it is about."""
    first: Iterator[dict[str, Any]] = table_records(path)
    return next(first, {}).get("run") or None


def corrected_mask(uri: str, size: tuple[int, int], classes: tuple[str, ...], max_megapixels: float) -> bytes:
    """A mask that a person corrected, in our palette.

    Raises:
        BadSample: it cannot be read, has another size than its picture, or values that are no class.
    """
    try:
        label = decode_seg_label(read_object(uri)[0], max_megapixels)
    except ObjectError as error:
        raise BadSample(error.reason, error.reason) from error
    if label.shape != size:
        raise BadSample("size_mismatch", f"{label.shape[1]} x {label.shape[0]}, its picture {size[1]} x {size[0]}")
    values = np.unique(label)
    foreign = values[(values > len(classes)) & (values != IGNORE_INDEX)]
    if len(foreign):
        raise BadSample("bad_seg", f"value {foreign[0]}, but there are {len(classes)} classes")
    return encode_mask(label)


def _key(record: Mapping[str, Any]) -> str:
    return str(record["key"]).removeprefix("./")
