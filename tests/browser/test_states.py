"""What the page says when something is wrong or waited for, and how it looks to different eyes and screens."""

import re
from itertools import pairwise

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("uvicorn", reason="the page is served by the extra serve")

from playwright.sync_api import Page, expect  # noqa: E402

from tests.browser.desk import finished, open_desk, proceed, text_of  # noqa: E402
from tests.browser.fake_server import FakeServer, Step, refusal  # noqa: E402


def test_waits_for_a_server_that_loads(page: Page, server: FakeServer) -> None:
    server.loading_answers = 1
    page.goto(server.url)
    expect(page.locator("#notice")).to_have_text("The model is still loading.")
    expect(page.locator("#model option")).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()


def test_asks_for_the_api_key(page: Page, server: FakeServer) -> None:
    server.api_key = "secret"
    page.goto(server.url)
    expect(page.locator("#notice")).to_contain_text("asks for its API key")
    expect(page.locator("#api-key")).to_be_focused()
    page.keyboard.type("secret")
    page.keyboard.press("Tab")
    expect(page.locator("#notice")).to_be_hidden()
    page.fill("#text", "x")
    proceed(page)
    assert text_of(page) == "x the old king."
    assert "secret" not in str(page.evaluate("JSON.stringify(localStorage)"))


def test_full_server_is_asked_again_after_the_time_it_names(page: Page, server: FakeServer) -> None:
    full = refusal(429, "the queue is full", {"Retry-After": "2"})
    server.refusals = [full]
    open_desk(page, server, "x")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#notice")).to_have_text("The queue is full. Trying again in 2 s.")
    finished(page)
    assert text_of(page) == "x the old king."
    expect(page.locator("#notice")).to_be_hidden()
    assert len(server.completions) == 2
    server.refusals = [refusal(429, "the queue is full", {"Retry-After": "60"})]
    page.keyboard.press("Control+Enter")
    expect(page.locator("#notice")).to_contain_text("Trying again in 60 s")
    page.keyboard.press("Escape")
    finished(page)
    expect(page.locator("#notice")).to_be_hidden()
    assert len(server.completions) == 3


def test_errors_are_said_and_the_text_stays(page: Page, server: FakeServer) -> None:
    open_desk(page, server)
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#notice")).to_contain_text("nothing to continue yet")
    page.fill("#text", "x")
    server.refusals = [refusal(400, "the prompt has 3000 tokens; the model reads 2048")]
    proceed(page)
    expect(page.locator("#notice")).to_have_text("The prompt has 3000 tokens; the model reads 2048.")
    assert text_of(page) == "x"
    server.breaks_after = 2
    proceed(page)
    expect(page.locator("#notice")).to_have_text("The server ran out of memory.")
    assert text_of(page) == "x the old"
    expect(page.locator("#versions [aria-current]")).to_contain_text("broken off")
    page.route("**/v1/completions", lambda route: route.abort())
    proceed(page)
    expect(page.locator("#notice")).to_contain_text("does not answer")


def test_model_that_ends_at_once_is_said(page: Page, server: FakeServer) -> None:
    server.script = lambda model, prompt: [Step(b"", 0.9)]
    server.finish_reason = "stop"
    open_desk(page, server, "The end.")
    proceed(page)
    assert text_of(page) == "The end."
    expect(page.locator("#status")).to_have_text("The model ends the text here.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_theme_follows_the_system_until_chosen(page: Page, server: FakeServer, scheme: str) -> None:
    dark = "getComputedStyle(document.body).color === 'rgb(233, 230, 223)'"
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    open_desk(page, server)
    assert page.evaluate(dark) == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    page.select_option("#theme", other)
    page.reload()
    assert page.evaluate(dark) == (other == "dark")


def test_nothing_is_wider_than_a_small_screen(page: Page, server: FakeServer) -> None:
    server.models = ("bloom", "an-adapter-with-quite-a-long-name-that-does-not-fit")
    page.set_viewport_size({"width": 360, "height": 700})
    open_desk(page, server, "There was")
    page.check("[name=compare]")
    proceed(page)
    page.locator(".column button").first.click()
    page.focus("#text")
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("#alternatives")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_every_control_has_a_name_and_a_visible_focus(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    snapshot = page.locator("body").aria_snapshot()
    for name in ("textbox", "button", "combobox", "checkbox", "spinbutton"):
        # a control without a name is written without quotes
        assert not re.search(rf"- {name}( \[|:|$)", snapshot, re.MULTILINE), snapshot
    page.focus("#text")
    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
        )
        seen.add(focused)
        # the sheet shows its focus by its border and the cursor
        assert (
            focused in ("text", "BODY")
            or page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        )
    assert {"continue", "undo", "copy", "colours", "temperature", "seed"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_probability_differ_in_brightness_and_keep_the_text_legible(
    page: Page, server: FakeServer, scheme: str
) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    open_desk(page, server)
    colours = page.evaluate(
        "[...document.querySelectorAll('.legend .piece')].map(n => getComputedStyle(n).backgroundColor)"
        ".concat(getComputedStyle(document.querySelector('#text')).color)"
    )
    *shades, ink = [luminance(colour) for colour in colours]
    # from the unlikely on: away from the ink, in steps that an eye without colours sees
    contrasts = [(max(shade, ink) + 0.05) / (min(shade, ink) + 0.05) for shade in shades]
    assert len(contrasts) == 5 and min(contrasts) > 4.5
    assert all(later / earlier > 1.04 for earlier, later in pairwise(contrasts)), contrasts


def luminance(colour: str) -> float:
    """Relative luminance of rgb(r, g, b); source: WCAG 2.2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
