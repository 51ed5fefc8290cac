"""Label sets of any size without a model: rows as labelling writes them, few pictures behind them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from labelling import picture

from afa_core.classes import SHAPES
from afa_core.data.sample import encode_mask
from afa_core.data.shapes import draw
from infra.object_store import find_object
from pipelines.inventory import ROWS
from pipelines.label_set import MANIFEST, SCHEMA_VERSION
from pipelines.label_sources import Listed
from pipelines.unit_table import UNIT_ROWS, part_name

PICTURES = 8
SIZE_PX = 64
DRAWN_SEED = 9  # of ``labelling.picture``
QUARANTINED_EVERY = 50
REASONS = ("undecodable_image", "missing_object", "too_many_pixels")


def write_run(
    folder: Path,
    name: str,
    rows: int,
    *,
    unit_rows: int = 64,
    created: float = 1e9,
    keys: Sequence[str] = (),
    classes: tuple[str, ...] = SHAPES,
    unknown_tag: str = "hexagon",
    all_bad: bool = False,
) -> Path:
    """A finished run: ``rows`` inputs in units; one of fifty is quarantined, and it stood still once.

    Args:
        folder: of the label set.
        name: of the run.
        rows: inputs.
        unit_rows: of them in a unit.
        created: seconds since 1970; also moves the areas a little, so that runs differ.
        keys: of the first rows; the others are numbered.
        classes: names for the shapes.
        unknown_tag: that some pictures came with.
        all_bad: quarantine everything.
    """
    run = folder / name
    uris = _pictures(folder.parent / f"{folder.name}-pictures")
    _write_json(run / "run.json", _record(folder, created, classes))
    units = []
    (run / "labels").mkdir(parents=True)
    inventory = run / "inventory" / "0000"
    inventory.mkdir(parents=True)
    with pq.ParquetWriter(inventory / part_name(0), ROWS) as part:
        for number, start in enumerate(range(0, rows, unit_rows)):
            unit = f"0000-{number:06d}-{hashlib.sha256(f'{name}{number}'.encode()).hexdigest()[:12]}"
            numbers = range(start, min(rows, start + unit_rows))
            named = [keys[index] if index < len(keys) else f"{index % 997:03d}/{index:09d}" for index in numbers]
            table = [
                _row(index, key, uris[index % PICTURES], created) for index, key in zip(numbers, named, strict=True)
            ]
            for row in table:
                _rename(row, classes, unknown_tag)
            if all_bad:
                table = [_quarantined(row, "undecodable_image") for row in table]
            _write_unit(run, unit, number, table, created)
            inputs = [asdict(Listed(row["key"], row["uri"], etag=row["etag"])) for row in table]
            part.write_table(pa.Table.from_pylist(inputs, schema=ROWS))
            units.append({"name": unit, "part": 0, "row_group": number, "inputs": len(table)})
    pq.write_table(pa.Table.from_pylist(units, schema=UNIT_ROWS), inventory / "units.parquet")
    head = {"kind": "listing", "inputs": rows, "units": len(units), "skipped": 0, "time": created}
    _write_json(inventory / "inventory.json", head)
    return run


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """URI and etag of each."""
    folder.mkdir(exist_ok=True)
    uris = []
    for index in range(PICTURES):
        path = folder / f"{index}.png"
        if not path.is_file():
            path.write_bytes(picture(index, SIZE_PX))
        found = find_object(str(path))
        assert found is not None
        uris.append((found.uri, found.etag))
    return uris


def _record(folder: Path, created: float, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "created": created,
        "input": f"{folder}-pictures",
        "model": "models:/generated/1",
        "model_digest": hashlib.sha256(b"model").hexdigest(),
        "classes": classes,
        "label_config": {"max_megapixels": 100.0},
        "config_digest": hashlib.sha256(str(created).encode()).hexdigest(),
    }


def _row(index: int, key: str, picture_of: tuple[str, str], created: float) -> dict[str, Any]:
    uri, etag = picture_of
    identity = {"key": key, "input": key, "uri": uri, "etag": etag}
    if index % QUARANTINED_EVERY == 7:
        return _quarantined(identity, REASONS[index // QUARANTINED_EVERY % len(REASONS)])
    drawn = _DRAWN[index % PICTURES]
    doubt = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32
    areas = _AREAS[index % PICTURES]
    return {
        **identity,
        "status": "ok",
        "tags": list(drawn.tags),
        "tags_source": "given" if index % 2 else "predicted",
        "unknown_tags": ["hexagon"] if index % 11 == 0 else [],
        "width": SIZE_PX,
        "height": SIZE_PX,
        "area": [area * (1 - created % 7 / 20) for area in areas],
        "ignored_share": 0.0,
        "confidence": 1 - doubt / 2,
        "disagreement": doubt / 3,
        "affinity_disagreement": doubt / 4,
        "tags_without_pixels": [],
        "classes_without_tag": ["ring"] if index % 13 == 0 and "ring" not in drawn.tags else [],
        "uncertainty": doubt,
    }


def _quarantined(row: dict[str, Any], reason: str) -> dict[str, Any]:
    identity = {name: row[name] for name in ("key", "input", "uri", "etag")}
    return {**identity, "status": "quarantined", "reason": reason, "detail": f"{reason} of {row['key']}"}


def _rename(row: dict[str, Any], classes: tuple[str, ...], unknown_tag: str) -> None:
    names = {**dict(zip(SHAPES, classes, strict=True)), "hexagon": unknown_tag}
    for column in ("tags", "unknown_tags", "classes_without_tag"):
        if column in row:
            row[column] = [names[name] for name in row[column]]


def _write_unit(run: Path, unit: str, number: int, table: list[dict[str, Any]], created: float) -> None:
    tar = _tar([(row["key"], index) for index, row in enumerate(table) if row["status"] == "ok"], table)
    labels = run / "labels"
    (labels / f"{unit}-a.tar").write_bytes(tar)
    rows = labels / f"{unit}-a.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=MANIFEST), rows)
    reasons = [row["reason"] for row in table if row["status"] != "ok"]
    paused = 7200.0 * (number >= 40)  # killed and resumed two hours later
    marker = {
        "unit": unit,
        "images": len(table),
        "labels": len(table) - len(reasons),
        "reasons": {reason: reasons.count(reason) for reason in set(reasons)},
        "unknown_tags": {},
        "tar": f"{unit}-a.tar",
        "rows": f"{unit}-a.parquet",
        "tar_sha256": hashlib.sha256(tar).hexdigest(),
        "rows_sha256": hashlib.sha256(rows.read_bytes()).hexdigest(),
        "finished": created + 60 + 3.0 * number + paused,
        "stage_seconds": {"read": 0.5, "decode": 0.4, "label": 2.0 + number % 5 / 10, "write": 0.1},
    }
    _write_json(labels / f"{unit}.done.json", marker)


def _tar(keys: list[tuple[str, int]], table: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, index in keys:
            mask = _MASKS[int(Path(table[index]["uri"]).stem)]
            for name, data in ((f"{key}.png", mask), (f"{key}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


_DRAWN = [draw(DRAWN_SEED, index, SIZE_PX) for index in range(PICTURES)]
_AREAS = [[float((drawn.label == SHAPES.index(tag) + 1).mean()) for tag in drawn.tags] for drawn in _DRAWN]
_MASKS = [encode_mask(drawn.label) for drawn in _DRAWN]
