"""What a report counts: sums, bounds, and the honest time axis."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.label_set import CommittedUnit, Marker
from pipelines.reporting.changes import EarlierLabels
from pipelines.reporting.choice import Choice, by_unit
from pipelines.reporting.numbers import BINS, REASONS, ROWS_PER_REASON, Histogram, Numbers, main_doubt
from pipelines.reporting.throughput import BUCKETS, Throughput
from pipelines.scratch_table import ScratchTable

CLASSES = ("dog", "cat", "cow")
SHARES = st.floats(0, 1, width=32)


def row(key: str = "k", **values: Any) -> dict[str, Any]:
    return {
        "key": key, "input": key, "uri": f"/{key}", "status": "ok", "reason": None, "detail": None, "tags": ["dog"],
        "tags_source": "given", "unknown_tags": [], "area": [0.25], "ignored_share": 0.0, "confidence": 0.9,
        "disagreement": 0.1, "affinity_disagreement": None, "tags_without_pixels": [], "classes_without_tag": [],
        "uncertainty": 0.1, **values,
    }  # fmt: skip


def bad_row(key: str, reason: str = "unreadable") -> dict[str, Any]:
    return {"key": key, "input": key, "uri": f"/{key}", "status": "quarantined", "reason": reason, "detail": "why"}


def marker(unit: str = "u", finished: float = 10.0, images: int = 4, seconds: float = 2.0) -> Marker:
    return Marker(
        unit, images, images, {}, {}, "t", "r", "0", "0", finished, {"read": seconds / 4, "label": seconds * 3 / 4}
    )


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    made = []
    for index in range(draw(st.integers(0, 40))):
        if draw(st.booleans()) and index % 3 == 0:
            made.append(bad_row(f"k{index}", draw(st.sampled_from(["unreadable", "no_image"]))))
            continue
        tags = draw(st.lists(st.sampled_from(CLASSES), unique=True))
        area = [draw(SHARES) / 3 for _ in tags]
        made.append(row(f"k{index}", tags=tags, area=area, uncertainty=draw(SHARES), confidence=draw(SHARES)))
    return made


@given(rows())
def test_every_row_is_counted_once(made: list[dict[str, Any]]) -> None:
    numbers = Numbers(CLASSES)
    for item in made:
        numbers.add(item)
    labelled = [item for item in made if item["status"] == "ok"]
    assert numbers.counts.images == len(made)
    assert numbers.counts.labels == len(labelled) == sum(numbers.doubts.values())
    assert sum(numbers.counts.reasons.values()) == len(made) - len(labelled)
    assert all(sum(histogram.bins) == len(labelled) for histogram in numbers.histograms.values())
    for name in CLASSES:
        areas = [dict(zip(item["tags"], item["area"], strict=True)).get(name, 0) for item in labelled]
        assert numbers.classes[name].present == sum(area > 0 for area in areas)
        assert numbers.classes[name].area == pytest.approx(sum(areas))


def test_a_histogram_keeps_its_edges() -> None:
    histogram = Histogram()
    for value in (0.0, 0.049, 0.05, 0.999, 1.0, 1.0001, -0.0001):
        histogram.add(value)
    assert (histogram.bins[0], histogram.bins[1], histogram.bins[BINS - 1]) == (3, 1, 3)


def test_what_is_kept_of_quarantined_rows_is_bounded() -> None:
    numbers = Numbers(CLASSES)
    for index in range(5000):
        numbers.add(bad_row(f"k{index}" + "x" * 2000, f"reason {index % 100}"))
    assert len(numbers.counts.reasons) == 100
    assert len(numbers.quarantined) == REASONS
    assert all(len(kept) == ROWS_PER_REASON for kept in numbers.quarantined.values())
    assert max(len(item["key"]) for kept in numbers.quarantined.values() for item in kept) < 400


@pytest.mark.parametrize(
    ("values", "doubt"),
    [
        ({"tags": [], "area": []}, "no_class"),
        ({"tags_without_pixels": ["dog"]}, "tag_without_pixels"),
        ({"classes_without_tag": ["cat"]}, "class_without_tag"),
        ({"disagreement": 0.5}, "opinions_differ"),
        ({"affinity_disagreement": 0.5}, "affinity_differs"),
        ({"confidence": 0.2}, "low_confidence"),
        ({"ignored_share": 0.8}, "ignored_pixels"),
    ],
)
def test_the_largest_term_of_the_uncertainty_is_the_reason(values: dict[str, Any], doubt: str) -> None:
    assert main_doubt(row(**values)) == doubt


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.1, 50), st.integers(1, 64)), min_size=1, max_size=30))
def test_every_picture_is_in_the_curve_and_no_pause_is(units: list[tuple[float, float, int]]) -> None:
    throughput = Throughput()
    for finished, seconds, images in units:
        throughput.add(marker(finished=finished, images=images, seconds=seconds))
    curve = throughput.curve()
    assert curve is not None
    assert sum(curve.rates) * curve.active_s / BUCKETS == pytest.approx(sum(images for *_, images in units), rel=1e-6)
    assert curve.active_s + sum(pause.seconds for pause in curve.pauses) == pytest.approx(curve.ended - curve.began)


def test_a_run_that_was_resumed_has_the_rate_of_its_work() -> None:
    throughput = Throughput()
    for finished in (*range(2, 22, 2), *range(7202, 7222, 2)):
        throughput.add(marker(finished=finished, images=20, seconds=2))
    curve = throughput.curve()
    assert curve is not None
    assert curve.rates == pytest.approx([10] * BUCKETS)
    assert [(pause.after_s, pause.seconds) for pause in curve.pauses] == [(20, 7180)]
    assert Throughput().curve() is None


@given(rows(), st.integers(1, 20))
def test_the_choice_is_bounded_has_every_class_and_does_not_depend_on_order(
    made: list[dict[str, Any]], size: int
) -> None:
    def chosen(some: list[dict[str, Any]]) -> list[str]:
        choice = Choice(size)
        for item in some:
            choice.add(CommittedUnit("run", marker(item["key"]), [item]), {})
        return [item.row["key"] for item in choice.chosen()]

    keys = chosen(made)
    labelled = {item["key"]: item for item in made if item["status"] == "ok"}
    assert len(keys) == len(set(keys)) == min(size, len(labelled))
    assert sorted(chosen(made[::-1])) == sorted(keys) or size < len(CLASSES)
    occurring = {
        tag for item in labelled.values() for tag, area in zip(item["tags"], item["area"], strict=True) if area
    }
    shown = {
        tag for key in keys for tag, area in zip(labelled[key]["tags"], labelled[key]["area"], strict=True) if area
    }
    if size >= len(CLASSES):
        assert shown == occurring


def test_half_of_the_choice_is_the_head_of_the_queue() -> None:
    choice = Choice(20)
    made = [row(f"k{index}", uncertainty=index / 1000, area=[0.0]) for index in range(1000)]
    choice.add(CommittedUnit("run", marker(), made), {})
    keys = {item.row["key"] for item in choice.chosen()}
    assert {f"k{index}" for index in range(990, 1000)} <= keys
    (unit,) = by_unit("run", choice.chosen())
    assert {item["key"] for item in unit.rows} == keys


def test_changes_are_found_by_key(tmp_path: Any) -> None:
    with ScratchTable(tmp_path, "earlier") as table:
        earlier = EarlierLabels(table)
        earlier.keep([row("a"), row("b"), bad_row("c"), row("gone")])
        now = [row("a"), row("b", tags=["cat"], area=[0.25]), row("c"), bad_row("d"), row("new")]
        assert earlier.compare(now) == pytest.approx({"a": 0.0, "b": 0.25})
        assert earlier.compare([row("a", tags=["dog"], area=[0.15], ignored_share=0.1)]) == pytest.approx({"a": 0.1})
        assert (earlier.changes.compared, earlier.changes.other_classes) == (3, 1)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(), max_size=30))
def test_a_scratch_table_is_a_dictionary(values: dict[str, int]) -> None:

    with tempfile.TemporaryDirectory() as folder, ScratchTable(Path(folder), "t") as table:
        table.put((key, -1) for key in values)
        table.put(values.items())
        assert len(table) == len(values)
        assert dict(table.items()) == table.get([*values, "\x00not there\x00"]) == values
