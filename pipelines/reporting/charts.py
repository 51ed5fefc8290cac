"""Charts as inline SVG: bars without text, so that they stretch with the page while their labels keep their size."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

HEIGHT = 100.0


def histogram(counts: Sequence[int], name: str, earlier: Sequence[int] | None = None) -> str:
    """Bars of counts over 0..1; those of an earlier run as an outline, scaled to the same number of pictures."""
    scaled = _scaled(earlier, sum(counts)) if earlier else []
    top = max([*counts, *scaled, 1])
    width = 1 / len(counts)
    titles = [
        f"{index * width:.2f} to {(index + 1) * width:.2f}: {count:,} pictures" for index, count in enumerate(counts)
    ]
    body = _bars(counts, titles, top) + (_outline(scaled, top) if scaled else "")
    return _figure(name, body, len(counts), f"{top:,.0f}", ["0", "0.5", "1"])


def rates(values: Sequence[float], name: str, labels: Sequence[str], pauses: Sequence[tuple[float, str]]) -> str:
    """Bars of images/s over the time at work.

    Args:
        values: one for each part of the time.
        name: of the chart.
        labels: below the axis, spread evenly.
        pauses: place 0..1 and words, marked by a dashed line.
    """
    top = max([*values, 1e-9])
    titles = [f"{value:.1f} images/s" for value in values]
    body = _bars(values, titles, top)
    for place, words in pauses:
        x = place * len(values)
        line = f'<line class="pause" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{HEIGHT:.0f}"/>'
        body += f"<g>{line}<title>{escape(words)}</title></g>"
    return _figure(name, body, len(values), f"{top:,.1f}", labels)


def share_bar(share: float) -> str:
    """A small bar for a table's cell."""
    width = max(0.0, min(1.0, share)) * 100
    return (
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="8"/><rect class="bar" width="{width:.1f}" height="8"/></svg>'
    )


def swatch(colour: str) -> str:
    """A square of a class's colour."""
    return (
        '<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">'
        f'<rect width="10" height="10" fill="{escape(colour)}"/></svg>'
    )


def _scaled(counts: Sequence[int], total: int) -> list[float]:
    factor = total / max(1, sum(counts))
    return [count * factor for count in counts]


def _bars(values: Sequence[float], titles: Sequence[str], top: float) -> str:
    parts = []
    for index, (value, title) in enumerate(zip(values, titles, strict=True)):
        high = HEIGHT * value / top
        parts.append(
            f'<rect class="bar" x="{index + 0.06:.2f}" y="{HEIGHT - high:.2f}" width="0.88" height="{high:.2f}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return "".join(parts)


def _outline(values: Sequence[float], top: float) -> str:
    points = []
    for index, value in enumerate(values):
        y = HEIGHT * (1 - value / top)
        points += [f"{index},{y:.2f}", f"{index + 1},{y:.2f}"]
    return f'<polyline class="earlier" points="{" ".join(points)}"/>'


def _figure(name: str, body: str, width: int, top: str, labels: Sequence[str]) -> str:
    ticks = "".join(f"<span>{escape(label)}</span>" for label in labels)
    return (
        f'<div class="chart"><span class="top">{escape(top)}</span>'
        f'<svg viewBox="0 0 {width} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" aria-label="{escape(name)}">'
        f'{body}</svg><div class="axis">{ticks}</div></div>'
    )
