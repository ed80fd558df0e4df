"""Writing with the page in a real browser: what a user sees and does, against a server that says what a test wants."""

import re
import time
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("uvicorn", reason="the page is served by the extra serve")

from playwright.sync_api import Page, expect  # noqa: E402

from tests.browser.desk import choose, finished, open_desk, pieces, proceed, reload_desk, text_of  # noqa: E402
from tests.browser.fake_server import FakeServer, Step, steps_of  # noqa: E402


def test_continue_streams_text_coloured_by_probability(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    assert text_of(page) == "There was the old king."
    assert pieces(page) == [(" the", "p4"), (" old", "p2"), (" king", "p0"), (".", "p3")]
    body = server.completions[0]
    assert (body["model"], body["prompt"], body["stream"], body["logprobs"]) == ("bloom", "There was", True, 5)
    # the colours lie exactly below the text: both break their lines at the same places
    heights = page.evaluate("['layer', 'text'].map(id => document.getElementById(id).scrollHeight)")
    assert heights[0] == heights[1]
    shades = {
        page.evaluate(f"getComputedStyle(document.querySelector('#layer .p{n}')).backgroundColor") for n in (0, 2, 3, 4)
    }
    assert len(shades) == 4
    page.uncheck("#colours")
    background = "getComputedStyle(document.querySelector('#layer .p0')).backgroundColor"
    assert page.evaluate(background) == "rgba(0, 0, 0, 0)"
    reload_desk(page, server)
    expect(page.locator("#colours")).not_to_be_checked()


def test_space_at_the_end_is_pointed_out(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was ")
    proceed(page)
    expect(page.locator("#status")).to_have_text("The text ended with a space; most tokens begin with their own.")
    proceed(page)
    expect(page.locator("#status")).to_have_text("")


def test_long_text_breaks_its_lines_in_both_layers_alike(page: Page, server: FakeServer) -> None:
    words = " ".join(f"word{number} with-hyphens,and a_long_one{'x' * (number % 40)}" for number in range(80))
    open_desk(page, server, f"{words}\n\nA second paragraph \n")
    proceed(page)
    heights = page.evaluate("['layer', 'text'].map(id => document.getElementById(id).scrollHeight)")
    assert heights[0] == heights[1] > 500
    page.fill("#text", "line\n" * 60)
    heights = page.evaluate("['layer', 'text'].map(id => document.getElementById(id).scrollHeight)")
    assert heights[0] == heights[1] > 1500


def test_alternatives_by_mouse_and_branch_with_exact_tokens(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    server.script = lambda model, prompt: steps_of(" girl", "!") if prompt.endswith(b" young") else []
    page.locator("#layer .piece", has_text="old").evaluate("n => n.scrollIntoView()")
    box = page.locator("#layer .piece", has_text="old").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    options = page.locator("#alternatives [role=option]")
    assert options.all_inner_texts() == ["·old\n30 %", "·young\n40 %", "·tired\n10 %"]
    assert "all others 20 %" in page.inner_text("#alternatives")
    choose(page, "young")
    assert text_of(page) == "There was the young girl!"
    branch = server.completions[1]["prompt"]
    assert [server.vocabulary[token] for token in branch] == [b"There", b" was", b" the", b" young"]
    assert pieces(page)[:2] == [(" the", "p4"), (" young", "p2")]
    # the alternatives of the place stay known in the branch, so that one can go back from there
    page.focus("#text")
    page.keyboard.press("Alt+ArrowDown")
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    assert [text.split("\n")[0] for text in options.all_inner_texts()] == ["·old", "·young", "·tired"]


def test_alternatives_by_keyboard(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    server.script = lambda model, prompt: steps_of(" sat", ".")
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("#alternatives .heading")).to_contain_text(".")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#alternatives .heading")).to_contain_text("king")
    page.keyboard.press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Alt+ArrowDown")
    for key in ("ArrowLeft", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    finished(page)
    assert text_of(page) == "There was the old man sat."


def test_stop_in_the_middle_keeps_what_came(page: Page, server: FakeServer) -> None:
    server.script = lambda model, prompt: steps_of(*(f" w{number}" for number in range(200)))
    server.seconds_per_token = 0.05
    open_desk(page, server, "Go")
    page.fill("[name=max_tokens]", "200")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#layer")).to_contain_text("w3")
    page.keyboard.press("Escape")
    finished(page)
    text = text_of(page)
    assert text.startswith("Go w0 w1 w2 w3") and "w199" not in text
    assert page.locator("#layer .piece").all_inner_texts() == re.findall(r" w\d+", text)
    expect(page.locator("#versions [aria-current]")).to_contain_text("stopped")
    expect(page.locator("#status")).to_have_text("Stopped.")
    deadline = time.monotonic() + 5
    while not server.disconnects and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.disconnects == 1


def test_undo_and_redo_of_whole_continuations(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "One")
    proceed(page)
    once = text_of(page)
    proceed(page)
    twice = text_of(page)
    assert twice == once + " the old king."
    page.keyboard.press("Control+z")
    assert text_of(page) == once
    page.click("#undo")
    assert text_of(page) == "One"
    assert pieces(page) == []
    page.keyboard.press("Control+Shift+Z")
    page.click("#redo")
    assert text_of(page) == twice
    assert len(pieces(page)) == 8
    expect(page.locator("#redo")).to_be_disabled()


def test_editing_keeps_colours_before_the_change_only(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    page.evaluate("document.getElementById('text').setSelectionRange(17, 17)")
    page.keyboard.type("er")
    assert text_of(page) == "There was the older king."
    assert [text for text, _ in pieces(page)] == [" the", " old"]
    # letter by letter back to the version, whose colours return, and then to the version before
    for _ in "er":
        page.keyboard.press("Control+z")
    assert text_of(page) == "There was the old king."
    assert len(pieces(page)) == 4
    page.keyboard.press("Control+z")
    assert text_of(page) == "There was"


def test_versions_list_returns_to_every_branch(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "There was")
    proceed(page)
    server.script = lambda model, prompt: steps_of(" a", " storm", ".")
    page.click("#undo")
    proceed(page)
    page.focus("#text")
    page.keyboard.press("Control+End")
    page.keyboard.type(" Mine.")
    proceed(page)
    rows = page.locator("#versions button")
    assert [text.split("\n")[1] for text in rows.all_inner_texts()] == [
        "There was",
        "the old king.",
        "a storm.",
        "Mine.",
        "a storm.",
    ]
    rows.nth(1).click()
    assert text_of(page) == "There was the old king."
    assert len(pieces(page)) == 4
    rows.nth(1).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert text_of(page) == "There was a storm."
    # an edit that was not continued is not lost either
    page.keyboard.press("Control+End")
    page.keyboard.type("?")
    rows.nth(0).click()
    page.click("#undo")
    assert text_of(page) == "There was a storm.?"


def test_characters_of_several_tokens_are_shown_whole(page: Page, server: FakeServer) -> None:
    heart = "\u2764".encode()
    cat = "\U0001f431".encode()
    server.script = lambda model, prompt: [
        Step(" \u6c49".encode(), 0.9),
        Step(heart[:1], 0.5, ((cat[:3], 0.4),)),
        Step(heart[1:], 0.9),
        Step(cat[:1], 0.5),
        Step(cat[1:3], 0.5),
    ]
    open_desk(page, server, "A")
    proceed(page)
    # the cat was cut off by the limit: half a character is not shown
    assert text_of(page) == "A \u6c49\u2764"
    assert pieces(page) == [(" \u6c49", "p4"), ("\u2764", "p2")]
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("#alternatives .heading")).to_contain_text("token 1 of 2 of \u201c\u2764\u201d")
    server.script = lambda model, prompt: [Step(cat[3:], 0.5), Step(b"!", 0.9)]
    choose(page, "bytes F0 9F 90")
    assert text_of(page) == "A \u6c49\U0001f431!"
    assert pieces(page)[1:] == [("\U0001f431", "p2"), ("!", "p4")]


def test_line_breaks_of_windows_do_not_shift_the_colours(page: Page, server: FakeServer) -> None:
    server.script = lambda model, prompt: steps_of(" one", "\r\n", "two", "\r", "\n", "three")
    open_desk(page, server, "Lines:")
    proceed(page)
    assert text_of(page) == "Lines: one\ntwo\nthree"
    assert [text for text, _ in pieces(page)] == [" one", "\n", "two", "\n", "three"]
    # the text is the version, so this goes back to the one before
    page.keyboard.press("Control+z")
    assert text_of(page) == "Lines:"


def test_model_text_is_never_html(page: Page, server: FakeServer) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    server.script = lambda model, prompt: [Step(evil.encode(), 0.5, ((b"<b>bold</b>", 0.2),))]
    server.models = (evil, "bloom")
    open_desk(page, server, "Write HTML:")
    page.check("[name=compare]")
    proceed(page)
    page.locator(".column button").first.click()
    page.focus("#text")
    page.keyboard.press("Alt+ArrowDown")
    assert text_of(page) == f"Write HTML:{evil}"
    expect(page.locator("#alternatives [role=option]").nth(1)).to_contain_text("<b>bold</b>")
    expect(page.locator("#versions")).to_contain_text("onerror")
    assert page.locator("main img, main script, main b:not(td b)").count() == 0
    assert page.title() == "bloomlm"


def test_every_paragraph_has_its_own_direction(page: Page, server: FakeServer) -> None:
    server.script = lambda model, prompt: steps_of(
        " \u0645\u0644\u0643", " \u0639\u0638\u064a\u0645", "\n", "The", " end"
    )
    open_desk(page, server, "In Arabic:\n\u0643\u0627\u0646 \u064a\u0627")
    proceed(page)
    sheet = page.locator("#layer").bounding_box()
    assert sheet is not None
    arabic = page.locator("#layer .piece").nth(0).bounding_box()
    later = page.locator("#layer .piece").nth(1).bounding_box()
    english = page.locator("#layer .piece", has_text="The").bounding_box()
    assert arabic is not None and later is not None and english is not None
    middle = sheet["x"] + sheet["width"] / 2
    # Arabic begins at the right edge and goes on to the left, beside paragraphs that begin at the left
    assert arabic["x"] > middle and later["x"] < arabic["x"]
    assert abs(english["x"] - sheet["x"]) < 2
    for style in ("unicodeBidi", "textAlign", "font", "lineHeight", "whiteSpace"):
        layers = page.evaluate(f"['layer', 'text'].map(id => getComputedStyle(document.getElementById(id)).{style})")
        assert layers[0] == layers[1]


def test_models_side_by_side(page: Page, server: FakeServer) -> None:
    server.models = ("bloom", "poems", "letters")
    server.script = lambda model, prompt: steps_of(f" by {model}", ".")
    open_desk(page, server, "Written")
    page.check("input[value=poems]")
    page.check("input[value=letters]")
    proceed(page)
    columns = page.locator(".column")
    assert [text.split("\n")[0] for text in columns.all_inner_texts()] == ["bloom", "poems", "letters"]
    assert columns.locator(".text").all_inner_texts() == [
        "Written by bloom.",
        "Written by poems.",
        "Written by letters.",
    ]
    assert {body["model"] for body in server.completions} == {"bloom", "poems", "letters"}
    assert text_of(page) == "Written"
    columns.nth(1).get_by_role("button", name="Keep this").click()
    assert text_of(page) == "Written by poems."
    expect(page.locator("#columns")).to_be_hidden()
    expect(page.locator("#layer .piece").last).to_be_in_viewport()
    # the others are versions too
    page.locator("#versions button", has_text="by letters").click()
    assert text_of(page) == "Written by letters."


def test_settings_are_sent_and_kept(page: Page, server: FakeServer) -> None:
    open_desk(page, server, "x")
    values = {
        "temperature": "0",
        "top_p": "0.5",
        "top_k": "7",
        "max_tokens": "3",
        "repetition_penalty": "1.2",
        "seed": "11",
    }
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=stop]", "\\n\\n\nEND")
    reload_desk(page, server)
    proceed(page)
    expected = {name: float(value) for name, value in values.items()} | {"stop": ["\n\n", "END"]}
    assert {name: server.completions[0][name] for name in expected} == expected
    assert text_of(page) == "x the old king"
    page.click("#defaults")
    proceed(page)
    assert server.completions[1]["temperature"] == 0.8
    assert "seed" not in server.completions[1] and "stop" not in server.completions[1]
    page.fill("[name=temperature]", "-1")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    assert page.evaluate("document.activeElement.name") == "temperature"
    assert len(server.completions) == 2


def test_text_ends_before_a_stop_text(page: Page, server: FakeServer) -> None:
    server.script = lambda model, prompt: steps_of(" one", " two", " STOP")
    server.finish_reason = "stop"
    server.cut_characters = 4
    open_desk(page, server, "Count:")
    proceed(page)
    assert text_of(page) == "Count: one two "
    assert [text for text, _ in pieces(page)] == [" one", " two", " "]
    expect(page.locator("#versions [aria-current]")).to_contain_text("ended")


def test_counts_copies_and_saves(page: Page, server: FakeServer, tmp_path: Path) -> None:
    open_desk(page, server, "four words are here")
    expect(page.locator("#count")).to_have_text("4 of 2,048 tokens")
    page.click("#copy")
    expect(page.locator("#status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "four words are here"
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "saved.txt")
    assert (tmp_path / "saved.txt").read_text() == "four words are here"
    # the text survives a reload
    reload_desk(page, server)
    assert text_of(page) == "four words are here"


def test_starters_of_an_empty_sheet(page: Page, server: FakeServer) -> None:
    open_desk(page, server)
    page.locator("#starters button").first.click()
    assert text_of(page).startswith("Once upon a time")
    expect(page.locator("#starters")).to_be_hidden()
