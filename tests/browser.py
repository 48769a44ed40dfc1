"""Pages in a real browser: Chromium, driven by playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Watched:
    """A page, and what it did. requests: addresses that it asked for; errors: what went wrong in it; said: all that
    stands on its console."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def outside(self, *allowed: str) -> list[str]:
        """Requests that do not begin with one of these, and are no data of the page's own."""
        return [each for each in self.requests if not each.startswith((*allowed, "data:", "blob:"))]

    def overflow(self) -> int:
        """Pixels that the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Any, width: int = 1280, height: int = 900, **context: Any) -> Iterator[Watched]:
    """A new page in a window of that size. context: further options of playwright's `new_page`."""
    page = browser.new_page(viewport={"width": width, "height": height}, **context)
    seen = Watched(page)

    def hear(said: Any) -> None:
        seen.said.append(said.text)
        if said.type == "error":
            seen.errors.append(said.text)

    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("websocket", lambda socket: seen.requests.append(socket.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", hear)
    page.set_default_timeout(20_000)
    yield seen
    page.close()
