"""The labelling driver without pictures: nothing lost, nothing twice, and no more of a run in memory than a window."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import label_windows
from pipelines.inventory import InventoryWriter, list_generations, load_units
from pipelines.label_leftovers import leftovers
from pipelines.label_plan import count_plan
from pipelines.label_set import Marker, scratch_table
from pipelines.label_sources import Listed
from pipelines.unit_table import Unit, UnitTableWriter, read_units

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scaling_model  # noqa: E402
import scheduling  # noqa: E402
from workers import Workers  # noqa: E402


def units(number: int) -> Iterator[Unit]:
    return (Unit(name, "part", 0, 64) for name in scheduling.unit_names(number))


def test_a_window_is_all_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_windows, "MAX_BLOCKS", 4)
    monkeypatch.setattr(label_windows, "BLOCKS_PER_WORKER", 3)
    rest = units(1000)
    windows = label_windows.in_windows(rest, 2)
    first = next(windows)
    assert len(first) == 6 * label_windows.BLOCK_UNITS
    names = list(scheduling.unit_names(1000))
    assert next(rest).name == names[len(first)]
    given = [unit.name for window in (first, *windows) for unit in window]
    assert given == names[: len(first)] + names[len(first) + 1 :]


@pytest.mark.parametrize(("number", "blocks"), [(1, 1), (4096, 4096), (60_000, 4096), (10**6, 62_500)])
def test_blocks_are_single_units_then_longer_then_more(number: int, blocks: int) -> None:
    assert label_windows.block_count(number) == blocks


def test_the_table_of_units_comes_back_in_order(tmp_path: Path) -> None:
    names = list(scheduling.unit_names(40_000))
    with UnitTableWriter(tmp_path / "units.parquet") as table:
        for number, name in enumerate(names):
            table.add(name, number // 64, number % 64, 3)
    assert (table.units, table.inputs) == (40_000, 120_000)
    back = list(read_units(str(tmp_path)))
    assert [unit.name for unit in back] == names == sorted(names)
    assert back[-1] == Unit(names[-1], f"{tmp_path}/part-00624.parquet", 63, 3)


def test_names_of_more_units_than_a_million_sort_as_they_come(tmp_path: Path) -> None:
    writer = InventoryWriter(tmp_path)
    writer.gather([Listed("a", "/x/a.jpg", 1)])
    writer.gathered = 1_000_001  # as if so many were listed
    generation = writer.write(str(tmp_path / "run"), "0000", "listing", "identity", 64, 100)
    writer.close()
    assert next(load_units(str(tmp_path / "run"), generation)).name.startswith("0000-0000000-")


def test_leftovers_are_what_no_marker_names() -> None:
    def marker_of(unit: str) -> Marker:
        assert unit == "0000-000001-bb", "this marker need not be read"
        return Marker(unit, 1, 1, {}, {}, f"{unit}-2.tar", f"{unit}-2.parquet", "", "", 0.0, {})

    whole = ["0000-000000-aa-1.parquet", "0000-000000-aa-1.tar", "0000-000000-aa.done.json"]
    twice = ["0000-000001-bb-1.tar", "0000-000001-bb-2.parquet", "0000-000001-bb-2.tar", "0000-000001-bb.done.json"]
    cut_off = ["0000-000002-cc-1.tar", "stray.tar"]
    assert list(leftovers([*whole, *twice, *cut_off], marker_of)) == ["0000-000001-bb-1.tar", *cut_off]


def test_workers_that_die_lose_no_unit_and_do_none_twice() -> None:
    model = Workers(8, life_s=300.0)
    assert sorted(model.run_window(4000, 250, 64)) == list(range(4000))
    assert model.deaths > 10
    assert 0 < model.lost_s < model.useful_s


def test_a_run_is_planned_labelled_and_cleared_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_windows, "MAX_BLOCKS", 16)
    monkeypatch.setattr(label_windows, "BLOCKS_PER_WORKER", 1)
    assert scheduling.label_with_model(3000, 2)["windows"] == 11  # it checks that every unit was committed once


def test_a_plan_of_three_times_as_many_units_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for number in (20_000, 60_000):
        run = tmp_path / str(number)
        scheduling.write_inventory(run, number)
        assert [generation.units for generation in list_generations(str(run))] == [number]
        with scratch_table("committed") as done:
            tracemalloc.start()
            done.put((name, None) for name in scheduling.committed_before(number))
            assert count_plan(str(run), done).waiting_units == number * 9 // 10
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_the_document_says_what_the_model_does() -> None:
    document = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for part in scaling_model.tables(scaling_model.Assumptions()).split("\n\n"):
        assert part in document, f"{part[:60]}...: put the output of tests/benchmarks/scaling_model.py into it"


def test_assumptions_can_be_replaced() -> None:
    assert scaling_model.build_assumptions({"gpu_step_s": "0.8"}).gpu_step_s == 0.8
    with pytest.raises(SystemExit, match="gpu_step is no assumption"):
        scaling_model.build_assumptions({"gpu_step": 1})
