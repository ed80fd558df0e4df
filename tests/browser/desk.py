"""What a test does with the page."""

from playwright.sync_api import Page, expect

from tests.browser.fake_server import FakeServer


def open_desk(page: Page, server: FakeServer, text: str = "") -> None:
    page.goto(server.url)
    _has_models(page, server)
    if text:
        page.fill("#text", text)


def reload_desk(page: Page, server: FakeServer) -> None:
    page.reload()
    _has_models(page, server)


def _has_models(page: Page, server: FakeServer) -> None:
    """Wait for the names of the models, before which nothing is continued."""
    expect(page.locator("#model option")).to_have_count(len(server.models))


def proceed(page: Page) -> None:
    """Continue with the keyboard and wait for the end."""
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    finished(page)


def finished(page: Page) -> None:
    expect(page.locator("#continue")).to_be_visible()


def text_of(page: Page) -> str:
    return page.input_value("#text")


def pieces(page: Page) -> list[tuple[str, str]]:
    """Text and class of each coloured piece."""
    found = page.locator("#layer .piece").evaluate_all("nodes => nodes.map(n => [n.textContent, n.className])")
    return [(text, classes.removeprefix("piece ")) for text, classes in found]


def choose(page: Page, label: str) -> None:
    page.locator("#alternatives [role=option]", has_text=label).click()
    finished(page)
