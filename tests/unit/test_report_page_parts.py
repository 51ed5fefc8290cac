"""The page as text: escaping, its size, its policy, and charts that are well-formed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from html import escape
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.reporting import charts, sections
from pipelines.reporting.html import MAX_BYTES, build_page, table, to_json
from pipelines.reporting.numbers import Numbers

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too: file names need not be UTF-8
PLACES = ("heading", "about", "totals", "time", "classes", "doubt", "gallery", "quarantined", "footer")


def page_of(text: str, cards: list[dict[str, Any]]) -> tuple[bytes, int]:
    return build_page(text, dict.fromkeys(PLACES, escape(text)), {"command": text}, cards)


@given(ANY_TEXT)
def test_data_cannot_leave_their_element(text: str) -> None:
    written = to_json({"key": text})
    assert written.isascii()
    assert not set(written) & set("<>&")
    assert json.loads(written) == {"key": text}


@given(ANY_TEXT)
def test_any_text_makes_a_page(text: str) -> None:
    page, count = page_of(text, [{"key": text}])
    assert count == 1
    markup = page.decode("utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', markup, re.DOTALL)
    assert json.loads(data) == {"command": text, "cards": [{"key": text}]}
    assert markup.count("<script") == 2


def test_names_that_look_like_the_templates_marks_stay_names() -> None:
    page, _ = page_of("@data@ $script ${style} $$", [])
    assert b"<h1>@data@ $script ${style} $$</h1>" in page


def test_cards_beyond_the_limit_are_left_out() -> None:
    cards = [{"key": str(index), "picture": "x" * 100_000} for index in range(400)]
    page, count = page_of("title", cards)
    assert MAX_BYTES - 200_000 < len(page) <= MAX_BYTES < 20_000_000
    assert count < 400


def test_the_policy_names_the_very_script_and_style() -> None:
    markup = page_of("title", [])[0].decode()
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", markup, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src &#x27;sha256-{digest}&#x27;" in markup
    assert "default-src &#x27;none&#x27;" in markup
    assert " style=" not in markup  # the policy would stop it


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=30), st.lists(st.integers(0, 10**9), max_size=30))
def test_charts_are_well_formed_and_bars_stay_inside(counts: list[int], earlier: list[int]) -> None:
    chart = charts.histogram(counts, '<"&', earlier or None)
    root = ElementTree.fromstring(f"<page>{chart}</page>")
    bars = [bar for bar in root.iter("rect") if bar.get("class") == "bar"]
    assert len(bars) == len(counts)
    for bar in bars:
        top, height = float(bar.get("y", "")), float(bar.get("height", ""))
        assert top >= -0.01
        assert top + height <= charts.HEIGHT + 0.01
    ElementTree.fromstring(charts.rates([0.0, 2.5], "rates", ["0", "1 h"], [(0.5, '<"& stood still')]))


@given(ANY_TEXT)
def test_sections_escape_what_they_show(text: str) -> None:
    numbers = Numbers([text])
    numbers.add({"key": text, "uri": text, "status": "quarantined", "reason": text, "detail": text})
    for markup in (
        sections.quarantined(numbers),
        sections.classes(numbers, [text], None),
        sections.about({"model": text, "input": text, "created": 0.0}, None),
        table([text], [[escape(text)]], text),
    ):
        foreign = re.findall(r"<(?!/?(?:div|table|caption|thead|tbody|tr|th|td|svg|rect|dl|dt|dd|p|code|label|select"
                             r"|option|span)[ >])", markup)  # fmt: skip
        assert foreign == []


def test_durations_are_readable() -> None:
    seconds = (0.04, 12, 95, 3599, 7300, 360_000)
    assert [sections.duration(value) for value in seconds] == [
        "0.0 s",
        "12 s",
        "2 min",
        "60 min",
        "2 h 02 min",
        "100 h 00 min",
    ]
