"""A Chromium and a server for the tests of the page; without them the tests are skipped."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.browser.fake_server import FakeServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def server() -> "Iterator[FakeServer]":
    from tests.browser.fake_server import ENGLISH, FakeServer, running

    with running(FakeServer(script=lambda model, prompt: ENGLISH)) as served:
        yield served


@pytest.fixture
def page(browser: "Browser", server: "FakeServer") -> "Iterator[Page]":
    context = browser.new_context(
        viewport={"width": 1200, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    # a refused request is logged by the browser itself
    opened.on(
        "console",
        lambda line: problems.append(line.text) if line.type == "error" and "Failed to load" not in line.text else None,
    )
    yield opened
    assert problems == []
    context.close()
