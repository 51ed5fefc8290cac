"""The parts of the report's page that need no script: totals, times, classes, histograms, quarantined rows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape
from typing import Any

from afa_core.classes import palette
from pipelines.reporting import charts
from pipelines.reporting.changes import Changes
from pipelines.reporting.html import table
from pipelines.reporting.numbers import MEASURES, ROWS_PER_REASON, Numbers
from pipelines.reporting.throughput import PAUSE_S, Curve, Throughput


@dataclass(frozen=True)
class Earlier:
    """The run that is compared with: its record and numbers, and what changed since."""

    name: str
    record: dict[str, Any]
    numbers: Numbers
    changes: Changes


def about(record: dict[str, Any], earlier: Earlier | None) -> str:
    """What the run is."""
    rows = {
        "Model": record["model"],
        "Input": record["input"],
        "Begun": moment(record["created"]),
        "Compared with": f"{earlier.name}, {earlier.record['model']}" if earlier else "no earlier run of this input",
    }
    return f'<dl class="about">{_pairs(rows)}</dl>'


def totals(numbers: Numbers, curve: Curve | None, committed: int, planned: int) -> str:
    """Tiles, and a notice where the run is not finished."""
    counts = numbers.counts
    tiles = {
        "pictures": (f"{counts.images:,}", f"{committed:,} of {planned:,} units"),
        "labels": (f"{counts.labels:,}", f"{percent(counts.labels, counts.images)} of the pictures"),
        "quarantined": (f"{counts.quarantined:,}", f"{percent(counts.quarantined, counts.images)} of the pictures"),
        "tags given": (f"{numbers.given:,}", "else predicted"),
        "ignored pixels": (percent(numbers.ignored, counts.labels), "mean of the labels"),
    }
    if curve:
        tiles["at work"] = (duration(curve.active_s), f"{sum(curve.rates) / len(curve.rates):,.1f} images/s")
    body = "".join(
        f'<div><dt>{name}</dt><dd>{value}<span class="note">{note}</span></dd></div>'
        for name, (value, note) in tiles.items()
    )
    unfinished = f'<p class="notice">Unfinished: {planned - committed:,} of {planned:,} units have no labels yet.</p>'
    unknown = ""
    if counts.unknown_tags:
        rows = [[escape(tag), f"{number:,}"] for tag, number in sorted(counts.unknown_tags.items(), key=_most)]
        unknown = "<h3>Tags that the model has no class for</h3>" + table(["tag", "pictures"], rows, "Unknown tags")
    return f'{unfinished if committed < planned else ""}<dl class="tiles">{body}</dl>{unknown}'


def times(throughput: Throughput, curve: Curve | None) -> str:
    """Throughput over time, and where the workers' time went."""
    if curve is None:
        return "<p>No unit is finished yet.</p>"
    pauses = [(pause.after_s / max(curve.active_s, 1e-9), f"stood still for {duration(pause.seconds)}")
              for pause in curve.pauses]  # fmt: skip
    chart = charts.rates(
        curve.rates,
        "Images per second over the time at work",
        ["0", duration(curve.active_s / 2), duration(curve.active_s)],
        pauses,
    )
    still = sum(pause.seconds for pause in curve.pauses)
    words = f"From {moment(curve.began)} to {moment(curve.ended)}."
    if curve.pauses:
        times_said = "once" if len(curve.pauses) == 1 else f"{len(curve.pauses):,} times"
        words += (
            f" The run stood still {times_said} (dashed), {duration(still)} altogether: pauses of more than"
            f" {PAUSE_S:.0f} s are cut out and count in no rate."
        )
    seconds = throughput.stage_seconds
    rows = [
        [escape(stage), f"{percent(value, seconds.total())}{charts.share_bar(value / max(seconds.total(), 1e-9))}",
         duration(value)]
        for stage, value in seconds.most_common()
    ]  # fmt: skip
    stages = table(["stage", "share", "workers' time"], rows, "Workers' time by stage")
    return f'<h3>Images/s</h3>{chart}<p class="soft">{words}</p><h3>Workers\' time</h3>{stages}'


def classes(numbers: Numbers, names: list[str], earlier: Earlier | None) -> str:
    """Presence and area of every class, and how they changed."""
    heads = ["class", "tagged", "pictures with it", "share of pictures", "mean area where it is"]
    rows = []
    for index, name in enumerate(names, start=1):
        own = numbers.classes[name]
        presence = numbers.presence(name)
        row = [
            f"{charts.swatch(colour(index))}{escape(name)}",
            f"{own.tagged:,}",
            f"{own.present:,}",
            f"{presence:.1%}{charts.share_bar(presence)}",
            f"{own.mean_area:.1%}{charts.share_bar(own.mean_area)}",
        ]
        if earlier:
            row.insert(4, _delta(presence - earlier.numbers.presence(name)))
            row.append(_delta(own.mean_area - earlier.numbers.mean_area(name)))
        rows.append(row)
    if earlier:
        heads = [*heads[:4], "since earlier", heads[4], "since earlier"]
    return table(heads, rows, "Classes: presence and area") + (_changes(earlier) if earlier else "")


def doubt(numbers: Numbers, earlier: Earlier | None) -> str:
    """Histograms of what a label knows about its own doubt."""
    parts = []
    for name in MEASURES:
        own = numbers.histograms[name]
        other = earlier.numbers.histograms[name] if earlier else None
        mean = f"mean {own.mean:.2f}" + (f", earlier {other.mean:.2f}" if other else "")
        chart = charts.histogram(own.bins, f"{name} of the labels, {mean}", other.bins if other else None)
        parts.append(f'<div><h3>{name.capitalize()}</h3>{chart}<p class="soft">{mean}</p></div>')
    return f'<div class="columns">{"".join(parts)}</div>{_legend() if earlier else ""}'


def quarantined(numbers: Numbers) -> str:
    """Reasons, and the first rows of each."""
    reasons = numbers.counts.reasons
    if not reasons:
        return "<p>Nothing is quarantined.</p>"
    ordered = sorted(reasons.items(), key=_most)
    rows = [[f"<code>{escape(name)}</code>", f"{count:,}"] for name, count in ordered]
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in sorted(numbers.quarantined))
    kept = [row for name, _ in ordered for row in numbers.quarantined.get(name, [])]
    cells = [[escape(row[name]) for name in ("key", "reason", "detail", "uri")] for row in kept]
    examples = table(["key", "reason", "detail", "where"], cells, "Quarantined rows")
    return (
        f"{table(['reason', 'pictures'], rows, 'Quarantined by reason')}"
        f"<p>The first {ROWS_PER_REASON} rows of each reason; <code>afa label --only quarantined</code> tries them"
        " again.</p>"
        '<div class="controls" role="group" aria-label="Quarantined rows"><label hidden>Reason '
        f'<select id="filter-reason"><option value="">all</option>{options}</select></label>'
        f'<p class="soft" id="quarantined-shown" role="status" aria-live="polite">{len(kept):,} rows shown</p></div>'
        f'<div id="quarantined-rows" class="words">{examples}</div>'
    )


def colour(index: int) -> str:
    """A class's colour in masks, as ``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*palette()[3 * index : 3 * index + 3])


def percent(part: float, whole: float) -> str:
    """A share as people read it."""
    return f"{part / whole:.1%}" if whole else "-"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{minutes} min" if hours < 2 else f"{hours} h {minutes_left:02d} min"


def moment(seconds: float) -> str:
    """A time of day, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _changes(earlier: Earlier) -> str:
    changes = earlier.changes
    if not changes.compared:
        return '<p class="notice">No picture has a label in both runs.</p>'
    chart = charts.histogram(changes.distance.bins, "Share of the pixels that changed, of pictures labelled by both")
    return (
        f"<h3>Picture by picture</h3><p>{changes.compared:,} pictures have a label of both runs;"
        f" {changes.other_classes:,} of them ({percent(changes.other_classes, changes.compared)}) show other classes"
        f" now. At least {changes.distance.mean:.1%} of the pixels changed their class, by the areas.</p>"
        f'<div class="columns"><div><h3>Pixels that changed, a picture</h3>{chart}</div></div>'
    )


def _legend() -> str:
    return (
        '<p class="legend"><span><svg viewBox="0 0 14 7" aria-hidden="true"><rect class="bar" width="14" height="7"/>'
        '</svg>this run</span><span><svg viewBox="0 0 14 7" aria-hidden="true"><polyline class="earlier"'
        ' points="0,5 7,5 7,2 14,2"/></svg>earlier run, for as many pictures</span></p>'
    )


def _delta(change: float) -> str:
    points = 100 * change
    if abs(points) < 0.05:
        return "0.0 points"
    return f'<span class="{"up" if points > 0 else "down"}">{abs(points):.1f} points</span>'


def _pairs(rows: dict[str, str]) -> str:
    return "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())


def _most(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]
