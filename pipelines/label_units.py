"""The output of a work unit: masks and rows held until they are committed.

Names of files derive from the content, so an attempt that was cut off leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from infra.object_store import write_object
from pipelines.label_inputs import Input
from pipelines.label_job import StageSeconds
from pipelines.label_set import MANIFEST, MARKER, Counts, label_uri, write_json


@dataclass
class UnitWriter:
    """Holds a unit's output until it is committed; masks are small."""

    run: str
    name: str
    counts: Counts = field(default_factory=Counts)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = wds.TarWriter(self._buffer, mtime=0, encoder=False)

    def add_label(self, item: Input, mask_png: bytes, facts: dict[str, Any], row: dict[str, Any]) -> None:
        """A labelled picture: its mask, its JSON and its manifest row."""
        self._tar.write({"__key__": item.key, "png": mask_png, "json": json.dumps(facts, sort_keys=True).encode()})
        self._add_row(item, "ok", row)
        self.counts.labels += 1
        self.counts.see_unknown(row["unknown_tags"])

    def quarantine(self, item: Input) -> None:
        """An input that has no label; the row says why."""
        self._add_row(item, "quarantined", {"reason": item.reason, "detail": item.detail})
        self.counts.reasons[item.reason] = self.counts.reasons.get(item.reason, 0) + 1

    def commit(self, seconds: StageSeconds, facts: dict[str, Any]) -> None:
        """Data first, manifest part next, marker last.

        Raises:
            ServiceError: the store takes no more.
        """
        started = time.monotonic()
        self._tar.close()
        tar = self._buffer.getvalue()
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows, schema=MANIFEST), table)
        digests = [hashlib.sha256(data).hexdigest() for data in (tar, table.getvalue())]
        attempt = hashlib.sha256("".join(digests).encode()).hexdigest()[:8]
        tar_name, rows_name = f"{self.name}-{attempt}.tar", f"{self.name}-{attempt}.parquet"
        write_object(label_uri(self.run, tar_name), tar)
        write_object(label_uri(self.run, rows_name), table.getvalue())
        seconds.write += time.monotonic() - started
        marker = {
            "unit": self.name,
            "images": self.counts.images,
            "labels": self.counts.labels,
            "reasons": self.counts.reasons,
            "unknown_tags": self.counts.unknown_tags,
            "tar": tar_name,
            "rows": rows_name,
            "tar_sha256": digests[0],
            "rows_sha256": digests[1],
            "finished": time.time(),
            "stage_seconds": {name: round(value, 4) for name, value in vars(seconds).items()},
            **facts,
        }
        write_json(label_uri(self.run, f"{self.name}{MARKER}"), marker)

    def _add_row(self, item: Input, status: str, values: dict[str, Any]) -> None:
        identity = {"key": item.key, "input": item.parent, "uri": item.uri, "etag": item.etag}
        self.rows.append({**identity, "status": status, **values})
        self.counts.images += 1
