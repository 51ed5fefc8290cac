"""A self-contained page of pictures and their masks: no script, no network, everything inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; text-align: left; }
tr:nth-child(even) { background: #f4f4f4; } td + td { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #ddd; border-radius: 6px; padding: .5rem; }
figure div { display: flex; gap: 4px; } img { width: 33%; image-rendering: pixelated; border-radius: 3px; }
figcaption { font-size: .85rem; color: #555; margin-top: .3rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Card:
    """A caption and PNG pictures by what they show."""

    caption: str
    pictures: Mapping[str, bytes]


def render_page(title: str, intro: str, tables: Mapping[str, Mapping[str, str]], cards: Sequence[Card]) -> str:
    """HTML of a page. All text is escaped: captions may come from file names and tags."""
    parts = [f"<h1>{escape(title)}</h1><p>{escape(intro)}</p>"]
    for heading, rows in tables.items():
        body = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in rows.items())
        parts.append(f"<h2>{escape(heading)}</h2><table>{body}</table>")
    parts.append('<div class="cards">' + "".join(map(_card, cards)) + "</div>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _card(card: Card) -> str:
    images = "".join(
        f'<img alt="{escape(name)}" title="{escape(name)}" src="{data_uri("png", png)}">'
        for name, png in card.pictures.items()
    )
    return f"<figure><div>{images}</div><figcaption>{escape(card.caption)}</figcaption></figure>"


def data_uri(kind: str, data: bytes) -> str:
    """An encoded picture (``png``, ``jpeg``) as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
