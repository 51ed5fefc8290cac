"""What attempts that were cut off have left in the label folder, and how it goes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from infra.object_store import delete_object
from pipelines.label_set import MARKER, Marker, label_files, label_uri, load_marker, scratch_table

FILES_OF_A_UNIT = 3  # marker, tar, table


def remove_leftovers(run: str) -> int:
    """Delete what no marker names: files of attempts that were cut off. Only for who holds the run's lease."""
    removed = 0
    with scratch_table("files") as files:
        files.put((name, None) for name in label_files(run))
        for name in leftovers((name for name, _ in files.items()), lambda unit: load_marker(run, unit)):
            delete_object(label_uri(run, name))
            removed += 1
    return removed


def leftovers(names: Iterable[str], marker_of: Callable[[str], Marker]) -> Iterator[str]:
    """Of the names in the label folder, sorted, those that no marker names.

    A unit with a marker, one tar and one table has had one attempt: its marker need not be read.
    """
    for unit, group in itertools.groupby(names, unit_of):
        found = list(group)
        if f"{unit}{MARKER}" not in found:
            yield from found
        elif len(found) > FILES_OF_A_UNIT:
            marker = marker_of(unit)
            yield from (name for name in found if name not in (f"{unit}{MARKER}", marker.tar, marker.rows))


def unit_of(name: str) -> str:
    """The unit that a file is of: the first three words of ``GENERATION-NUMBER-DIGEST-ATTEMPT.tar``."""
    return "-".join(name.split(".", 1)[0].split("-")[:3])
