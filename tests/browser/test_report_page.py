"""The report's page in a real browser: foreign names, keyboard, decisions, phones, dark mode."""

from __future__ import annotations

import csv
import io
import itertools
import tarfile
from pathlib import Path
from typing import Any

import pytest
from generated_labels import write_run

from afa_core.data.shards import load_dataset_index, verify_shards
from pipelines.cli import main as afa
from pipelines.label_set import load_run

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "<!--<script>",
    "javascript:alert(3)",
    "=1+1",
    "@SUM(1,2)",
    '+"quoted", and a comma',
    "0007",
    "-5",
    "__proto__",
    "constructor",
    "@data@",
    "$title ${data}",
    "line\u2028separator",
    "a&lt;b",
    "ключ 🗝",
    "x" * 200,
)
CLASSES = ("</option><script>alert(4)</script>", "a,b", "__proto__", "star", "<b>ring</b>")
NAME = '"><img src=y onerror=alert(5)>'
RUN = "run-00000002"


def report(labels: Path, *words: str) -> Path:
    page = labels.parent / "report.html"
    assert afa(["report", str(labels), "--output", str(page), *words]) == 0
    return page


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / NAME
    for name, created in (("run-00000001", 1e9), (RUN, 1e9 + 5e5)):
        write_run(folder, name, 150, created=created, keys=HOSTILE, classes=CLASSES, unknown_tag=HOSTILE[0])
    return folder


@pytest.fixture(scope="module")
def page_file(labels: Path) -> Path:
    return report(labels)


def shown_keys(page: Any) -> list[str]:
    titles: list[str] = page.locator("#cards > li:visible h3").all_text_contents()
    return titles


def decisions_of(page: Any) -> list[dict[str, str]]:
    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "review.csv"
    text = Path(waiting.value.path()).read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_foreign_names_do_nothing_and_nothing_is_asked_of_any_server(page_file: Path, open_page: Any) -> None:
    watched = open_page(page_file)
    page = watched.page
    page.wait_for_timeout(300)
    assert watched.is_quiet()
    keys = page.evaluate("JSON.parse(document.getElementById('data').textContent).cards.map(c => c.key)")
    assert {key for key in HOSTILE if key != HOSTILE[7]} <= set(keys)  # the eighth is quarantined
    assert set(shown_keys(page)) == set(keys)
    assert page.locator("script").count() == 2
    assert page.locator("img:not([src^='data:image/'])").count() == 0
    assert page.locator("#quarantined-rows th", has_text=HOSTILE[7]).count() == 1
    assert page.locator("#totals th", has_text=HOSTILE[0]).count() == 1
    options = page.locator("#filter-class option").all_text_contents()
    assert set(options) == {"all", *CLASSES}


def test_the_policy_stops_what_would_get_in(page_file: Path, open_page: Any) -> None:
    watched = open_page(page_file)
    page = watched.page
    page.evaluate(
        """() => {
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:9/x.png";
            document.body.append(image);
            const markup = "<b onclick='1'>x</b>";
            try { document.body.insertAdjacentHTML("beforeend", markup); } catch (error) { window.refused = true; }
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.refused")
    assert any("Content Security Policy" in text for text in watched.console)


def test_a_gallery_is_worked_through_by_keyboard_alone(page_file: Path, open_page: Any) -> None:
    watched = open_page(page_file)
    page = watched.page
    first, second, third = shown_keys(page)[:3]
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#cards > li')"):
            break
    focused = "document.activeElement.querySelector('h3').textContent"
    assert page.evaluate(focused) == first
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == second
    page.keyboard.press("r")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("f")
    assert page.evaluate(focused) == third
    page.keyboard.press("f")
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.classList.contains('peek')")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.getElementById('cards')).gridTemplateColumns.split(' ').length")
    assert page.evaluate(focused) == shown_keys(page)[2 + columns]
    page.keyboard.press("Home")
    assert page.evaluate(focused) == first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "accept"
    page.keyboard.press("Space")  # a button's own key: no longer accepted
    assert page.text_content("#decided") == "1 reject"
    page.keyboard.press("Enter")
    assert page.text_content("#decided") == "1 accept, 1 reject"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("far too small")  # letters in a note are no decisions
    assert page.text_content("#decided") == "1 accept, 1 reject"
    rows = {row["key"]: row for row in decisions_of(page)}
    assert rows[f"./{first}"]["note"] == "far too small"
    assert watched.is_quiet()


def test_the_slider_goes_from_picture_to_mask(page_file: Path, open_page: Any) -> None:
    page = open_page(page_file).page
    looks = "(() => ['picture', 'mask'].map(n => +getComputedStyle(document.querySelector(`.stage .${n}`)).opacity))()"
    page.focus("#view")
    seen = {}
    for key in ("Home", "End"):
        page.keyboard.press(key)
        seen[key] = (page.evaluate(looks), page.get_attribute("#view", "aria-valuetext"))
    assert seen == {"Home": ([1, 0], "picture, 0 %"), "End": ([0, 1], "mask, 100 %")}
    page.keyboard.press("ArrowLeft")
    assert 0 < page.evaluate(looks)[0] < 1


def test_filters_and_order(page_file: Path, open_page: Any) -> None:
    watched = open_page(page_file)
    page = watched.page
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
    uncertainty = {card["key"]: card["uncertainty"] for card in data["cards"]}
    values = [uncertainty[key] for key in shown_keys(page)]
    assert values == sorted(values, reverse=True)
    page.select_option("#sort", "key")
    assert shown_keys(page) == page.evaluate("keys => keys.sort()", shown_keys(page))
    page.select_option("#filter-class", CLASSES[0])
    expected = {card["key"] for card in data["cards"] if any(tag == CLASSES[0] for tag, area in card["areas"] if area)}
    assert set(shown_keys(page)) == expected
    assert page.text_content("#shown").startswith(f"{len(expected)} of {len(data['cards'])} shown")
    page.select_option("#filter-doubt", "class_without_tag")
    assert set(shown_keys(page)) == {
        card["key"] for card in data["cards"] if card["key"] in expected and card["doubt"] == "class_without_tag"
    }
    page.select_option("#filter-decision", "accept")
    assert shown_keys(page) == []
    assert page.is_visible("#none")
    page.select_option("#filter-reason", "missing_object")
    reasons = page.locator("#quarantined-rows tbody tr:visible td:first-of-type").all_text_contents()
    assert set(reasons) == {"missing_object"}
    assert watched.is_quiet()


def test_decisions_go_from_the_page_into_a_shard_set(
    labels: Path, page_file: Path, open_page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = open_page(page_file).page
    keys = shown_keys(page)
    choices = {key: ("accept", "reject", "fix")[index % 3] for index, key in enumerate(keys)}
    page.locator("#cards > li").first.focus()
    for key in keys:
        page.keyboard.press(choices[key][0])
        page.keyboard.press("ArrowRight")
    rows = decisions_of(page)
    record = load_run(str(labels / RUN))
    assert {row["key"]: row["decision"] for row in rows} == {f"./{key}": choice for key, choice in choices.items()}
    assert {(row["run"], row["model_digest"]) for row in rows} == {(RUN, record["model_digest"])}
    table, shards = tmp_path / "review.csv", tmp_path / "shards"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    words = ["review", "apply", str(labels), "--decisions", str(table), "--output", str(shards)]
    assert afa(words) == 0, capsys.readouterr().err
    index = load_dataset_index(shards)
    verify_shards(shards, index, index.splits)
    with tarfile.open(shards / "train-000000.tar") as tar:
        packed = {name.removesuffix(".seg.png") for name in tar.getnames() if name.endswith(".seg.png")}
    assert packed == {key for key, choice in choices.items() if choice == "accept"}
    page.click("#clear")
    assert page.text_content("#decided") == "nothing decided yet"
    assert page.is_disabled("#download")


def test_decisions_outlive_a_reload_and_a_browser_without_storage(page_file: Path, open_page: Any) -> None:
    page = open_page(page_file).page
    page.locator("#cards > li").first.focus()
    page.keyboard.press("r")
    page.reload()
    assert page.text_content("#decided") == "1 reject"
    refusing = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no'); } });"
    watched = open_page(page_file, before=refusing)
    watched.page.locator("#cards > li").first.focus()
    watched.page.keyboard.press("a")
    assert watched.page.text_content("#decided") == "1 accept"
    assert len(decisions_of(watched.page)) == 1
    assert watched.is_quiet()


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_screen_does_not_scroll_sideways(page_file: Path, open_page: Any, width: int) -> None:
    page = open_page(page_file, width=width).page
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    page.locator("#cards > li").first.focus()
    page.keyboard.press("f")
    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert root == [width, width]
    outside = """width => [...document.querySelectorAll("main *, header *, footer *, nav *")].filter(element =>
        !element.closest(".scroll, pre, svg, .unseen, datalist") && element.getBoundingClientRect().right > width + 0.5
        ).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside, width) == []
    clipped = """[...document.querySelectorAll("h1, h3, .card, .card *, .tiles *")].filter(element =>
        element.tagName !== "INPUT" && element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0
        ).map(element => element.outerHTML.slice(0, 80))"""
    assert page.evaluate(clipped) == []


CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const worst = new Map();
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !element.checkVisibility() || element.disabled) continue;
    if (element.closest("script, style, svg, option")) continue;
    const pair = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const name = `${element.tagName}.${element.className}`;
    worst.set(name, Math.min(ratio, worst.get(name) ?? 99));
  }
  return [...worst].filter(([, ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(page_file: Path, open_page: Any, scheme: str) -> None:
    page = open_page(page_file, scheme=scheme).page
    for key in ("a", "r", "f"):
        page.locator("#cards > li").nth("arf".index(key)).focus()
        page.keyboard.press(key)
    assert page.evaluate(CONTRASTS) == []
    darkness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (darkness == "rgb(15, 18, 22)") == (scheme == "dark")


def test_every_control_has_a_name_and_every_heading_its_level(page_file: Path, open_page: Any) -> None:
    page = open_page(page_file).page
    nameless = """[...document.querySelectorAll("button, select, input")].filter(element =>
        !element.textContent.trim() && !element.labels?.length && !element.getAttribute("aria-label")).length"""
    assert page.evaluate(nameless) == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(element => +element.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(landmark).count() == 1
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("rows", "all_bad", "cards"), [(10, False, 9), (1, False, 1), (12, True, 0)])
def test_small_and_empty_label_sets(tmp_path: Path, open_page: Any, rows: int, all_bad: bool, cards: int) -> None:
    write_run(tmp_path / "labels", RUN, rows, all_bad=all_bad)
    watched = open_page(report(tmp_path / "labels"))
    assert len(shown_keys(watched.page)) == cards
    assert watched.page.is_visible(".controls") == (cards > 0)
    assert watched.is_quiet()
