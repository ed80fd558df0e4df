"""The page against bloomlm serve itself, with the built-in model."""

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("uvicorn", reason="the page is served by the extra serve")

from playwright.sync_api import Page, expect  # noqa: E402

import bloomlm  # noqa: E402
from tests.browser.desk import finished, pieces, proceed, text_of  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def url(browser: "Browser") -> Iterator[str]:
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", "builtin:tiny", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        found = re.search(r"listening on (http://\S+?),", process.stderr.readline())
        assert found is not None
        wait_for(f"{found[1]}/health")
        yield found[1]
        process.terminate()
        process.communicate()


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)


@pytest.mark.parametrize(
    "text",
    [
        "English: Change password\nFrench:",
        "\u0643\u0627\u0646 \u064a\u0627 \u0645\u0627 \u0643\u0627\u0646",
        "\u4ece\u524d\uff0c\u5728\u4e00\u5ea7\u5c71\u4e0a",
    ],
    ids=["latin", "arabic", "chinese"],
)
def test_text_is_that_of_generate(page: Page, url: str, text: str) -> None:
    page.goto(url)
    expect(page.locator("#model option")).to_have_text(["builtin:tiny"])
    page.fill("#text", text)
    page.fill("[name=temperature]", "0")
    page.fill("[name=max_tokens]", str(NUM_TOKENS))
    proceed(page)
    expected = bloomlm.load("builtin:tiny").generate(text, max_new_tokens=NUM_TOKENS)[0].completion
    # a character that the limit cut off is not shown
    assert text_of(page) == text + expected.rstrip("\ufffd")
    assert "".join(piece for piece, _ in pieces(page)) == expected.rstrip("\ufffd")
    # the branch begins with the same text and goes on behind another token
    page.keyboard.press("Alt+ArrowDown")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    shown = page.locator("#alternatives [role=option]")
    assert shown.count() == 5
    percents = [float(value.split()[-2]) for value in shown.all_inner_texts() if "<" not in value]
    assert percents == sorted(percents, reverse=True)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    finished(page)
    assert text_of(page).startswith(text)
    assert text_of(page) != text + expected.rstrip("\ufffd")
    assert "\ufffd" not in text_of(page)
    expect(page.locator("#versions [aria-current]")).to_contain_text("builtin:tiny")
    expect(page.locator("#notice")).to_be_hidden()
