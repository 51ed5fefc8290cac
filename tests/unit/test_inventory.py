"""Inventories: whatever order and names a source has, every input is in one unit, under a key of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from afa_core.data.sample import check_key
from pipelines.inventory import Generation, InventoryWriter, generation_name, inventory_rows, load_units, unit_rows
from pipelines.label_sources import Listed

NAMES = st.text(alphabet="ab./-é\x07~", min_size=1, max_size=6)
LISTED = st.builds(
    Listed,
    key=NAMES,
    uri=NAMES.map(lambda name: f"s3://b/{name}"),
    size=st.integers(0, 100),
    etag=st.sampled_from(["1", "2"]),
    tags=st.none() | st.lists(st.sampled_from(["dog", 'a "b"']), max_size=2).map(tuple),
)


def write(folder: str, listed: Sequence[Listed], number: int = 0, unit_size: int = 3) -> Generation:
    """Generation ``number`` of a run, knowing those before it."""
    with tempfile.TemporaryDirectory() as scratch, closing(InventoryWriter(Path(scratch))) as writer:
        for earlier in range(number):
            writer.know(inventory_rows(folder, Generation(generation_name(earlier), "", 0, 0, 0)))
        writer.gather(listed)
        return writer.write(folder, generation_name(number), "listing", "identity", unit_size, 150)


@settings(deadline=None)
@given(st.lists(LISTED, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_every_input_once_whatever_the_order(listed: list[Listed], shuffler: random.Random) -> None:
    shuffled = list(listed)
    shuffler.shuffle(shuffled)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        generation = write(one, listed)
        rows = list(inventory_rows(one, generation))
        assert sorted(row.uri for row in rows) == sorted(row.uri for row in listed)
        keys = [row.key for row in rows]
        assert len(set(keys)) == len(keys)
        assert [check_key(key) for key in keys] == keys
        names = [unit.name for unit in load_units(one, generation)]
        assert len(set(names)) == len(names)
        units = [unit_rows(unit) for unit in load_units(one, generation)]
        assert [row for unit in units for row in unit] == rows
        assert all(len(unit) <= 3 for unit in units)
        distinct = len({(row.key, row.uri) for row in listed}) == len(listed)
        if distinct:  # of two listings of one object the order may decide which is the duplicate
            assert names == [unit.name for unit in load_units(two, write(two, shuffled))]


def test_units_end_at_a_number_or_a_size_and_shards_stand_alone() -> None:
    listed = [Listed(f"k{index}", f"/x/k{index}.jpg", 60) for index in range(5)]
    listed += [Listed("k2t", "/x/k2t.tar", 10), Listed("k9", "/x/k9.jpg", 10)]
    with tempfile.TemporaryDirectory() as folder:
        generation = write(folder, listed, unit_size=4)
        units = [[row.key for row in unit_rows(unit)] for unit in load_units(folder, generation)]
    assert units == [["k0", "k1", "k2"], ["k2t"], ["k3", "k4", "k9"]]


def test_a_second_listing_has_what_is_new_or_has_changed() -> None:
    first = [Listed("a", "/x/a.jpg", 1, "1"), Listed("b", "/x/b.jpg", 1, "1")]
    second = [
        first[0],
        Listed("b", "/x/b.jpg", 1, "2"),
        Listed("c", "/x/c.jpg", 1, "1"),
        Listed("a", "/x/a.png", 1, "1"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        write(folder, first)
        rows = list(inventory_rows(folder, write(folder, second, 1)))
        assert [row.uri for row in rows] == ["/x/a.png", "/x/b.jpg", "/x/c.jpg"]
        assert [row.key for row in rows][1:] == ["b", "c"]
        assert rows[0].key.startswith("a~")
        assert write(folder, second, 2).inputs == 0


def test_of_a_table_changed_tags_are_news_and_repeated_rows_are_not() -> None:
    first = [
        Listed("a", "/x/a.jpg", 1, "1", ("dog",)),
        Listed("a", "/x/a.jpg", 1, "1", ("cat",)),  # the same again: the first counts
        Listed("b", "/x/b.jpg", 1, "1", ("dog",)),
        Listed("two", "/x/b.jpg", 1, "1", ("cat",)),  # one picture under two keys, as the table says
    ]
    second = [*first[:2], Listed("b", "/x/b.jpg", 1, "1", ("cat",)), first[3], Listed("a", "/x/a.gif", 1, "1")]
    with tempfile.TemporaryDirectory() as folder:
        before = list(load_units(folder, write(folder, first)))
        keys = [row.key for row in inventory_rows(folder, Generation("0000", "", 0, 0, 0))]
        assert (keys[0], keys[2:]) == ("a", ["b", "two"])
        assert write(folder, first, 1).inputs == 0
        rows = list(inventory_rows(folder, write(folder, second, 1)))
        assert [(row.uri, row.tags) for row in rows] == [("/x/a.gif", None), ("/x/b.jpg", ("cat",))]
        assert rows[1].key == "b"
    with tempfile.TemporaryDirectory() as folder:
        changed = [first[0], first[1], second[2], first[3]]
        after = list(load_units(folder, write(folder, changed)))
        assert [one.name == other.name for one, other in zip(before, after, strict=True)] == [False, True]


def test_a_changed_picture_keeps_its_key_beside_a_new_one_that_wishes_for_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(folder, [Listed("a", "/x/a.png", 1, "1")])
        listed = [Listed("a", "/x/a.png", 1, "2"), Listed("a", "/x/a.jpg", 1, "1")]
        keys = {row.uri: row.key for row in inventory_rows(folder, write(folder, listed, 1))}
    assert keys["/x/a.png"] == "a"
    assert keys["/x/a.jpg"].startswith("a~")


def test_listing_a_large_store_holds_little_of_it() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "listing.py"
    answer = subprocess.run([sys.executable, script, "300000"], capture_output=True, text=True, check=True)
    facts = json.loads(answer.stdout)
    assert facts["objects"] == 300_000
    assert facts["peak_mib"] - facts["start_mib"] < 300
