"""Text that appears token by token: the joined pieces are the text of all tokens, cut before the first stop text."""

from hypothesis import given, settings
from hypothesis import strategies as st

import bloomlm
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.sequences import stop_test
from bloomlm.serving.text_stream import TextStream
from tests.fake_engine import TINY

TOKENIZER = Tokenizer.from_directory(TINY)
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40)
# Few letters, so that stop texts and their beginnings occur.
LETTERS = st.text("ab\u00e9\u4e2d\U0001f600", max_size=12)
STOPS = st.lists(st.text("ab\u00e9\u4e2d\U0001f600", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str], behind: int = 0) -> str:
    """The text before the first stop text that ends behind so many characters."""
    places = [place for place in range(len(text)) for stop in stops if ends_behind(text, place, stop, behind)]
    return text[: min(places, default=len(text))]


def ends_behind(text: str, place: int, stop: str, behind: int) -> bool:
    return text.startswith(stop, place) and place + len(stop) > behind


def length_of(ids: list[int]) -> int:
    return len(TOKENIZER.decode(ids))


def ended(ids: list[int], stops: list[str], min_tokens: int = 0) -> list[int]:
    """The ids up to the one that completes a stop text, where a session ends the sequence."""
    behind = length_of(ids[:min_tokens])
    texts = {count: TOKENIZER.decode(ids[:count]) for count in range(min_tokens + 1, len(ids) + 1)}
    ends = (count for count, text in texts.items() if cut(text, stops, behind) != text)
    return ids[: next(ends, len(ids))]


def pieces_of(ids: list[int], stops: list[str], min_tokens: int = 0) -> list[str]:
    stream = TextStream(TOKENIZER, stops, min_tokens)
    return [*map(stream.push, ids), stream.finish()]


@settings(max_examples=300, deadline=None)
@given(LETTERS, STOPS)
def test_pieces_of_texts_join_to_the_cut_text(text: str, stops: list[str]) -> None:
    ids = ended(TOKENIZER.encode(text), stops)
    pieces = pieces_of(ids, stops)
    assert "".join(pieces) == cut(TOKENIZER.decode(ids), stops)
    assert "\ufffd" not in "".join(pieces)


@settings(max_examples=300, deadline=None)
@given(IDS, st.data())
def test_pieces_of_any_ids_join_to_the_cut_text(ids: list[int], data: st.DataObject) -> None:
    whole = TOKENIZER.decode(ids)
    parts = st.builds(lambda a, b: whole[min(a, b) : max(a, b)], *[st.integers(0, len(whole))] * 2)
    # half a character at the end of ids is U+FFFD in their text, which pieces do not have yet
    wanted = parts.filter(lambda part: part and "\ufffd" not in part)
    stops = data.draw(st.lists(wanted, max_size=2)) if whole.replace("\ufffd", "") else []
    ids = ended(ids, stops)
    assert "".join(pieces_of(ids, stops)) == cut(TOKENIZER.decode(ids), stops)


@settings(max_examples=200, deadline=None)
@given(LETTERS, STOPS)
def test_what_is_shown_is_never_taken_back(text: str, stops: list[str]) -> None:
    ids = ended(TOKENIZER.encode(text), stops)
    shown = ""
    stream = TextStream(TOKENIZER, stops)
    for count, token in enumerate(ids, start=1):
        shown += stream.push(token)
        assert cut(TOKENIZER.decode(ids[:count]), stops).startswith(shown)


@settings(max_examples=500, deadline=None)
@given(LETTERS, STOPS, st.integers(0, 8))
def test_stop_texts_that_end_within_the_least_number_of_tokens_do_not_count(
    text: str, stops: list[str], min_tokens: int
) -> None:
    ids = TOKENIZER.encode(text)
    expected = ended(ids, stops, min_tokens)
    test = stop_test(stops, TOKENIZER.decode, min_tokens)
    assert next((ids[:count] for count in range(1, len(ids) + 1) if test(ids[:count])), ids) == expected
    pieces = pieces_of(expected, stops, min_tokens)
    assert "".join(pieces) == cut(TOKENIZER.decode(expected), stops, length_of(expected[:min_tokens]))


def test_a_completion_goes_on_behind_stop_texts_within_its_least_number_of_tokens() -> None:
    model = bloomlm.load("builtin:tiny")
    prompt, options = "The history of bread", {"max_new_tokens": 40, "stop": [" "]}
    (whole,) = model.generate(prompt, max_new_tokens=40)
    (first,) = model.generate(prompt, **options)
    (later,) = model.generate(prompt, **options, min_new_tokens=20)
    behind = length_of(whole.tokens[:20])
    assert len(first.tokens) < 10 and "stop" == first.finish_reason == later.finish_reason
    assert later.completion == cut(whole.completion, [" "], behind) and len(later.completion) >= behind
    assert "".join(pieces_of(later.tokens, [" "], 20)) == later.completion


def test_beginning_of_a_stop_text_is_held_back_until_it_is_decided() -> None:
    ids = TOKENIZER.encode("ab") + TOKENIZER.encode("x")
    assert len(ids) >= 2
    stream = TextStream(TOKENIZER, ["abab"])
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.push(ids[-1]) == "abx"


def test_stream_can_be_used_again() -> None:
    stream = TextStream(TOKENIZER, ["b"])
    for _ in range(2):
        assert "".join([*map(stream.push, TOKENIZER.encode("abc")), stream.finish()]) == "a"
        assert stream.num_characters == 0


def test_a_long_stop_text_is_looked_for_no_further_than_the_text_goes() -> None:
    """Comparing all of its beginnings with every piece would take minutes."""
    text = "bread and salt"
    assert "".join(pieces_of(TOKENIZER.encode(text), ["salt" * 500_000])) == text


def test_a_stop_text_with_special_tokens_inside_ends_a_sequence() -> None:
    """They have no text, and come where a sequence goes on after </s>."""
    special = TOKENIZER.encode("</s>")
    (first,), (last,) = TOKENIZER.encode("a"), TOKENIZER.encode("b")
    stops = stop_test(["ab"], TOKENIZER.decode)
    assert len(special) == 1 and stops([5, first, *special * 9, last])
    assert not stops([5, first, *special * 9]) and not stops([first, 5, *special * 9, last])
