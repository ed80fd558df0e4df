"""A corpus is read in pieces that tokenize as the whole, and figures of a fit are those of a slow computation."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from bloomlm.api import load
from bloomlm.data import corpus
from bloomlm.data.corpus import CORPUS, Piece, find_corpus, split_text
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError
from bloomlm.vocabulary.held_out import HeldOut
from bloomlm.vocabulary.measure import Fit, measure, total
from bloomlm.vocabulary.report import compare_fits, fit_table
from tests.bloom_tokenizer import make_tokenizer

WIKITEXT = Path(__file__).parents[3] / "shared" / "data" / "wikitext-2.test.tokens"
SAMPLES = {
    "en": "The quick brown fox, and the dog (it is 3.14 m long) | ended.\n\n  Another line; the end... \r\n" * 90,
    "zh": "在已知答案的前提下，问题：不，世界中的人、狗。他们说：“好！”然后走了？" * 200,
    "hi": "यह एक वाक्य है। दूसरा वाक्य, और तीसरा।" * 200,
    "ar": "هذه جملة، وهذه جملة أخرى۔ ثم النهاية؟ " * 200,
    "blank": " \n\t" * 3000 + "a" * 20_000 + " b" * 3000,
}


def tiny() -> Tokenizer:
    return load("builtin:tiny").tokenizer


def whole_texts() -> dict[str, str]:
    wikitext = WIKITEXT.read_text()[:300_000] if WIKITEXT.is_file() else "A text. " * 1000
    return {**SAMPLES, "wikitext": wikitext}


@pytest.mark.parametrize("name", whole_texts())
@pytest.mark.parametrize("make", [tiny, make_tokenizer])
def test_pieces_have_the_tokens_of_the_whole(name: str, make: type) -> None:
    text, tokenizer = whole_texts()[name], make()
    pieces, rest = split_text(text)
    assert "".join(pieces) == text and not rest
    assert len(pieces) > 2
    found = [token for ids in tokenizer.encode_batch(pieces) for token in ids]
    if name == "blank":  # a run of 20,000 letters without a word's beginning is cut inside
        assert max(map(len, pieces)) == corpus.LONGEST_PIECE_CHARACTERS
    else:
        assert found == tokenizer.encode(text)
        assert max(map(len, pieces)) <= corpus.PIECE_CHARACTERS


def test_files_are_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = whole_texts()["wikitext"][:50_000]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.setattr(corpus, "_BLOCK_CHARACTERS", 777)
    sizes: list[int] = []
    pieces = list(find_corpus([str(tmp_path / "a.txt")]).pieces(sizes.append))
    assert "".join(piece.text for piece in pieces) == text
    assert sum(sizes) == (tmp_path / "a.txt").stat().st_size
    ids = [token for ids in tiny().encode_batch([piece.text for piece in pieces]) for token in ids]
    assert ids == tiny().encode(text)


def test_rows_and_languages(tmp_path: Path) -> None:
    (tmp_path / "de").mkdir()
    rows = [{"text": "eins"}, {"src": "zwei", "tgt": "drei"}, {"text": "un", "lang": "fr"}]
    (tmp_path / "de" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "en.txt").write_text("one\r\n")
    found = find_corpus([str(tmp_path / "en.txt")], str(tmp_path))
    assert list(found.pieces()) == [
        Piece(CORPUS, "one\r\n"),
        Piece("de", "eins"),
        Piece("de", "zwei"),
        Piece("de", "drei"),
        Piece("fr", "un"),
        Piece("en", "one\r\n"),
    ]
    languages = {piece.language for piece in find_corpus(["builtin:dates"]).pieces()}
    assert len(languages) == 19 and "yo" in languages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.rst": "x"}, "no file in it ends in .txt"),
        ({"a.txt": b"\xff"}, "not UTF-8"),
        ({"a.jsonl": '{"text": 3}'}, "'text' is int"),
        ({"a.jsonl": '{"text": "\\ud800"}'}, "half of a surrogate pair"),
        ({"a.jsonl": '{"other": "x"}'}, "found the fields other"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, content: dict, message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        list(find_corpus([str(tmp_path)]).pieces())


def test_missing_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.rst").write_text("x")
    for names, message in [
        ([str(tmp_path / "none")], "no such file"),
        ([str(tmp_path / "a.rst")], "write other kinds as .jsonl"),
        ([], "no corpus is named"),
        (["builtin:none"], "there is builtin:dates"),
    ]:
        with pytest.raises(DataError, match=message):
            find_corpus(names)
    with pytest.raises(DataError, match="no such directory"):
        find_corpus([], str(tmp_path / "none"))


def test_held_out_texts_are_not_counted() -> None:
    pieces = list(find_corpus(["builtin:dates"]).pieces())
    held_out = HeldOut(400)
    rest = list(held_out.rest(pieces))
    assert Counter(rest) + Counter(held_out.pieces) == Counter(pieces)
    taken = {piece.language: 0 for piece in held_out.pieces}
    for piece in held_out.pieces:
        taken[piece.language] += len(piece.text.encode())
    assert len(taken) == 19 and max(taken.values()) <= 400 and min(taken.values()) > 300
    again = HeldOut(400)
    list(again.rest(pieces))
    assert again.pieces == held_out.pieces


def test_figures_are_those_of_one_text_after_another() -> None:
    loaded = load("builtin:tiny", dtype="float32")
    pieces = [Piece("en", "The model has fields."), Piece("zh", "人的 A中"), Piece("en", "A\nB"), Piece("en", "")]
    found = measure(pieces, loaded.tokenizer, loaded.model)
    expected: dict[str, float] = {"en": 0.0, "zh": 0.0}
    for piece in pieces:
        ids = loaded.tokenizer.encode(piece.text)
        given = torch.tensor([[loaded.tokenizer.bos_token_id, *ids]])
        log_probs = loaded.model(given)[0].detach().double().log_softmax(-1)
        expected[piece.language] -= sum(float(log_probs[place, token]) for place, token in enumerate(ids))
    assert list(found) == ["en", "zh"]
    for language, nats in expected.items():
        assert found[language].nats == pytest.approx(nats, rel=1e-5)
    assert (found["en"].num_words, found["zh"].num_words) == (6, 4)
    assert found["zh"].num_bytes == len("人的 A中".encode())
    joined = total(found)
    assert joined.bits_per_byte == pytest.approx(sum(expected.values()) / math.log(2) / joined.num_bytes, rel=1e-5)
    assert measure(pieces, loaded.tokenizer, None)["en"] == Fit(
        num_bytes=found["en"].num_bytes, num_words=6, num_tokens=found["en"].num_tokens
    )


def test_comparisons_as_values_and_as_a_table() -> None:
    old = Fit(num_bytes=10, num_words=4, num_tokens=6, nats=10 * math.log(2))
    new = Fit(num_bytes=10, num_words=4, num_tokens=8, nats=11 * math.log(2))
    found = compare_fits({"en": old, "de": old}, {"en": new, "de": old})
    assert found["en"]["after"]["tokens_per_word"] == 2.0
    assert found["all"]["after"]["bits_per_byte"] == pytest.approx(1.05)
    lines = fit_table(found).splitlines()
    assert lines[2] == "| en | 10 | 1.500 | 2.000 | 1.0000 | 1.1000 | +0.1000 (+10.00%) |"
    assert lines[4].startswith("| all | 20 | 1.500 | 1.750 | 1.0000 | 1.0500 |")
    unscored = Fit(num_bytes=10, num_words=4, num_tokens=6)
    assert fit_table(compare_fits({"en": unscored}, {"en": unscored})).splitlines()[2].endswith("| - | - | - |")


def test_pieces_say_where_a_document_ends(tmp_path: Path) -> None:
    long = whole_texts()["en"][:5000]
    (tmp_path / "a.txt").write_text(long, newline="")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", long, "")))
    (tmp_path / "c.txt").write_text("")
    documents, joined = [], ""
    for piece in find_corpus([str(tmp_path)]).pieces():
        joined += piece.text
        if piece.ends_document:
            documents.append(joined)
            joined = ""
    assert documents == [long, "one", long] and not joined
