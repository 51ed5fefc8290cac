"""Tables of pictures and tags: CSV, JSON lines or Parquet, read row by row so that their length costs no memory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from afa_core.errors import InputError

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
BATCH_ROWS = 4096


@dataclass(frozen=True)
class TableRow:
    """A picture by name (a path or URI), its tags if the table gives any, a key if the table has one."""

    name: str
    tags: tuple[str, ...] | None
    key: str | None


def table_rows(path: Path, name_columns: Sequence[str], tags_column: str) -> Iterator[TableRow]:
    """Rows of a table.

    Args:
        path: the table, by its suffix.
        name_columns: the first of these that is there names the picture.
        tags_column: a list, or a string with comma, semicolon or bar between tags; null: not tagged.

    Raises:
        InputError: there is no such table, it cannot be read, or no column names the picture.
    """
    try:
        records = table_records(path)
        first = next(records, None)
        if first is None:
            return
        column = next((name for name in name_columns if name in first), None)
        if column is None:
            raise InputError(f"{path} has no column {' or '.join(map(repr, name_columns))}: it has {', '.join(first)}")
        for record in itertools.chain([first], records):
            key = record.get("key")
            yield TableRow(str(record[column]), split_tags(record.get(tags_column)), None if key is None else str(key))
    except InputError:
        raise
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def table_records(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a table by column; those of a CSV as text.

    Raises:
        InputError: there is no such table, or it cannot be read.
    """
    try:
        yield from _records(path)
    except InputError:
        raise
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def require_column(path: Path, column: str) -> None:
    """See that a table has a column.

    Raises:
        InputError: it has none of that name.
    """
    first = next(_records(path), {column: None})
    if column not in first:
        raise InputError(f"{path} has no column {column!r}: it has {', '.join(first)}")


def split_tags(value: Any) -> tuple[str, ...] | None:
    """Tags of a list, or of a string that separates them with comma, semicolon or bar; None of null."""
    if value is None:
        return None
    parts = value if isinstance(value, list) else str(value).replace(";", ",").replace("|", ",").split(",")
    return tuple(dict.fromkeys(str(part).strip() for part in parts if str(part).strip()))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"no table {path}")
    match path.suffix.lower():
        case ".csv":
            return _csv_records(path)
        case ".jsonl" | ".json":
            return _json_records(path)
        case ".parquet":
            return _batch_records(pyarrow.parquet.ParquetFile(path).iter_batches(BATCH_ROWS))
    raise InputError(f"table {path}: its name must end in {', '.join(SUFFIXES)}")


def _csv_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every column as text: what a block makes look like numbers may be names in the next."""
    with pyarrow.csv.open_csv(path) as reader:
        names = reader.schema.names
    types = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    with pyarrow.csv.open_csv(path, convert_options=types) as reader:
        yield from _batch_records(reader)


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object")
            yield record


def _batch_records(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()
