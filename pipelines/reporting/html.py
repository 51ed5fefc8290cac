"""The report's page: one file with everything inside, which asks no server for anything.

Everything that comes from pictures, tags or their names is foreign text. Python escapes what it writes into the
markup; the gallery's data travel as JSON in which no ``<`` occurs, and the script puts them in place as text. A content
security policy lets nothing run or load but this page's own script, style and pictures.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

MAX_BYTES = 19_500_000
_ESCAPES = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def build_page(
    title: str, sections: Mapping[str, str], data: Mapping[str, Any], cards: Iterable[Mapping[str, Any]]
) -> tuple[bytes, int]:
    """The page as UTF-8, and how many of the cards it holds: as many as fit into ``MAX_BYTES``.

    Args:
        title: plain text.
        sections: markup by the name of its place in the template.
        data: what the script needs beside the cards.
        cards: most needed first.
    """
    style, script = _asset("page.css"), _asset("page.js")
    empty = Template(_asset("page.html")).substitute(
        sections,
        title=escape(title),
        policy=escape(_policy(style, script)),
        style=style,
        script=script,
        data="@data@",
    )
    # Names may contain the mark as well; nothing foreign comes behind the last one.
    head, tail = empty.encode("utf-8", "backslashreplace").rsplit(b"@data@", 1)
    start = to_json(data)[:-1] + ',"cards":['
    room = MAX_BYTES - len(head) - len(tail) - len(start) - len("]}")
    texts: list[str] = []
    for card in cards:
        text = to_json(card)
        if len(text) + 1 > room:
            break
        room -= len(text) + 1
        texts.append(text)
    return head + f"{start}{','.join(texts)}]}}".encode("ascii") + tail, len(texts)


def to_json(value: object) -> str:
    """JSON of ASCII characters that may stand inside a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).translate(_ESCAPES)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]], caption: str) -> str:
    """A table of cells that are markup already; the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>" + "".join(f'<th scope="row">{cell}</th>' if not i else f"<td>{cell}</td>" for i, cell in enumerate(row))
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _asset(name: str) -> str:
    return files("pipelines.reporting").joinpath("assets", name).read_text(encoding="utf-8")
