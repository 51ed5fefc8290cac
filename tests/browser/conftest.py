"""A real Chromium (Debian's package) for pages that are opened from a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")


@dataclass
class Watched:
    """A page, and everything that should not happen on it."""

    page: Any
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def is_quiet(self) -> bool:
        """No word on the console, no error, no dialog, nothing asked of any server."""
        assert (self.console, self.errors, self.dialogs) == ([], [], [])
        asked = [url for url in self.requests if not url.startswith(("file://", "data:", "blob:"))]
        assert asked == []
        return True


Open = Callable[..., Watched]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install -e '.[dev]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    """Opens a file in a fresh profile: ``open_page(path, width=1280, scheme="light", before="script")``."""
    contexts = []

    def open_file(path: Path, *, width: int = 1280, scheme: str = "light", before: str = "") -> Watched:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        page = watched.page
        page.on("console", lambda message: watched.console.append(message.text))
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        page.on("request", lambda request: watched.requests.append(request.url))
        page.on("dialog", lambda dialog: (watched.dialogs.append(dialog.message), dialog.accept()))
        if before:
            page.add_init_script(before)
        page.goto(path.as_uri())
        return watched

    yield open_file
    for context in contexts:
        context.close()
