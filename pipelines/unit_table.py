"""The table of work units of a generation, ``units.parquet``: written and read a few thousand rows at a time.

A billion pictures are 16 million units: a table of 0.5 GB, of which a driver never holds more than a row group.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from infra.object_store import fetch_file, join
from pipelines.unreadable import reading

UNITS = "units.parquet"
ROW_GROUP = 16_384
UNIT_ROWS = pa.schema([("name", pa.string()), ("part", pa.int32()), ("row_group", pa.int32()), ("inputs", pa.int32())])


@dataclass(frozen=True)
class Unit:
    """What is scheduled, retried, committed and resumed: a row group of an inventory part."""

    name: str
    part_uri: str
    row_group: int
    inputs: int


class UnitTableWriter:
    """Writes the table to a local file; the ``with`` block ends it."""

    def __init__(self, path: Path) -> None:
        # Names do not repeat, which is all that a dictionary could save.
        self._writer = pq.ParquetWriter(path, UNIT_ROWS, use_dictionary=False)
        self._rows: list[dict[str, Any]] = []
        self.units = 0
        self.inputs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, name: str, part: int, row_group: int, inputs: int) -> None:
        """The next unit, in key order."""
        self._rows.append({"name": name, "part": part, "row_group": row_group, "inputs": inputs})
        self.units += 1
        self.inputs += inputs
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=UNIT_ROWS))
            self._rows = []


def read_units(folder: str) -> Iterator[Unit]:
    """The units of the generation in ``folder``, in key order.

    Raises:
        UnreadableFile: their table is gone or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="afa-units-") as scratch, reading(uri := join(folder, UNITS)):
        path, _ = fetch_file(uri, Path(scratch))
        with pq.ParquetFile(path) as table:
            for index in range(table.num_row_groups):
                # Not iter_batches: it reads ahead, the further the longer the table is.
                for batch in table.read_row_group(index, use_threads=False).to_batches(ROW_GROUP):
                    for row in batch.to_pylist():
                        yield Unit(row["name"], join(folder, part_name(row["part"])), row["row_group"], row["inputs"])


def part_name(part: int) -> str:
    """File name of an inventory part."""
    return f"part-{part:05d}.parquet"
