"""Labels beside the pictures they were made from: what exports, reports and reviews read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from afa_core.data.sample import PICTURE_MEMBERS, BadSample
from pipelines.label_keys import sample_name
from pipelines.label_set import CommittedUnit
from pipelines.label_sources import Listed
from pipelines.raw_inputs import raw_inputs

MAX_FILE_MB = 1000.0
CHANGED = "changed_since_listing"


@dataclass(frozen=True)
class LabelledPicture:
    """A label, and the picture's own file.

    Attributes:
        row: of the manifest.
        mask_png: indexed PNG [height, width] in display orientation.
        facts: what the JSON beside the mask says.
        picture: the file as it is in the store; None if it cannot be had any more.
        extension: of the file, without the dot.
        problem: reason code where there is no picture, else empty.
    """

    row: dict[str, Any]
    mask_png: bytes
    facts: dict[str, Any]
    picture: bytes | None
    extension: str
    problem: str = ""


def labelled_pictures(unit: CommittedUnit, wanted: set[str] | None = None) -> Iterator[LabelledPicture]:
    """The labels of a unit with their pictures, read a few ahead; each label comes exactly once.

    Args:
        unit: with all columns of its rows.
        wanted: keys; None: all.
    """
    rows = {row["key"]: row for row in unit.rows if row["status"] == "ok" and (wanted is None or row["key"] in wanted)}
    if not rows:
        return
    members = unit.members()
    inputs = {row["input"]: row for row in rows.values()}
    listed = [Listed(key, _input_uri(row), etag=row["etag"]) for key, row in inputs.items()]
    for raw in raw_inputs(listed, int(MAX_FILE_MB * 1e6)):
        row = rows.pop(raw.key, None)
        if row is None:
            continue
        mask_png, facts = members[raw.key]
        changed = raw.etag != row["etag"]  # a shard is not compared while it is read
        picture, extension, problem = (None, "", CHANGED) if changed else _picture(raw.members)
        yield LabelledPicture(row, mask_png, facts, picture, extension, problem)
    for row in rows.values():  # samples of a shard that is gone, or is another one now
        yield LabelledPicture(row, *members[row["key"]], None, "", "missing_object")


def _input_uri(row: dict[str, Any]) -> str:
    """URI of the inventory's object; that of a sample in a shard ends in ``#NAME``."""
    if row["key"] == row["input"]:
        return str(row["uri"])
    return str(row["uri"]).removesuffix(f"#{sample_name(row['key'], row['input'])}")


def _picture(members: dict[str, Any] | BadSample) -> tuple[bytes | None, str, str]:
    if isinstance(members, BadSample):
        return None, "", members.reason
    extension = next((name for name in PICTURE_MEMBERS if name in members), None)
    return (None, "", "no_image") if extension is None else (members[extension], extension, "")
