"""Rows of preferences: which fields they have, how they are cut, and which answers are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bloomlm.data.answer_batch import collate_judged, collate_pairs
from bloomlm.data.files import FileRows
from bloomlm.data.preferences import AnswerPairs, ComparedSet, JudgedAnswers
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError
from tests.bloom_tokenizer import make_tokenizer

PAIRS = [
    {"prompt": "one two", "chosen": "three", "rejected": "four five"},
    {"prompt": "six", "chosen": "seven eight", "rejected": "nine"},
    {"prompt": "ten", "chosen": "eleven", "rejected": "twelve"},
]
JUDGED = [
    {"prompt": "one two", "completion": "three", "label": True},
    {"prompt": "six", "completion": "seven eight", "label": False},
    {"prompt": "ten", "completion": "eleven", "label": 1},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def write(path: Path, rows: list[dict[str, Any]]) -> FileRows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileRows(path)


def load(kind: type[ComparedSet], rows: FileRows, tokenizer: Tokenizer, **options: Any) -> Any:
    settings = {"src_length": 50, "tgt_length": 50, "cache_dir": rows.path.parent / "cache", "show_progress": False}
    return kind.load(rows, tokenizer, **settings | options)


def ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    found = tokenizer.encode_batch(list(texts))
    return [token for tokens in found for token in tokens] + [tokenizer.eos_token_id]


def test_pairs_are_the_prompt_with_each_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for _ in range(2):  # tokenised, then from the cache
        pairs = load(AnswerPairs, write(tmp_path / "a.jsonl", PAIRS), tokenizer)
        assert len(pairs) == 3
        for pair, row in zip(pairs, PAIRS, strict=True):
            assert pair.tokens.tolist() == ids(tokenizer, row["prompt"], row["chosen"])
            assert pair.other.tokens.tolist() == ids(tokenizer, row["prompt"], row["rejected"])
            prompt_length = len(ids(tokenizer, row["prompt"])) - 1
            assert pair.num_source_tokens == pair.other.num_source_tokens == prompt_length
            assert (pair.source_text, pair.target_text) == (row["prompt"], row["chosen"])
        batch = collate_pairs(list(pairs))
        assert batch.lengths == tuple(len(t.tokens) - 1 for pair in pairs for t in (pair, pair.other))
        assert [sum(batch.lengths[2 * i : 2 * i + 2]) + 1 for i in range(3)] == pairs.lengths.tolist()
        assert sum(sum(spans) for spans in batch.spans) == batch.num_supervised_tokens == pairs.num_supervised_tokens


def test_long_texts_lose_their_ends_but_not_the_last_token(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = load(AnswerPairs, write(tmp_path / "a.jsonl", PAIRS), tokenizer, src_length=1, tgt_length=2)
    for pair in pairs:
        for answer in (pair, pair.other):
            assert len(answer.tokens) == 3 and answer.tokens[-1] == tokenizer.eos_token_id


def test_a_part_has_its_own_references(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pairs = load(AnswerPairs, write(tmp_path / "a.jsonl", PAIRS), tokenizer)
    assert np.isnan(pairs[0].reference).all()
    part = pairs.with_reference(np.arange(6.0).reshape(3, 2)).part(1, 3)
    assert [pair.reference for pair in part] == [(2.0, 3.0), (4.0, 5.0)]
    assert part[0].tokens.tolist() == pairs[1].tokens.tolist() and part[-1].reference == (4.0, 5.0)
    assert collate_pairs(list(part)).reference.tolist() == [2.0, 3.0, 4.0, 5.0]
    with pytest.raises(IndexError):
        part[2]


@pytest.mark.parametrize("rows", [JUDGED, PAIRS], ids=["judged", "pairs"])
def test_judged_answers_meet_the_answer_of_another_row(
    rows: list[dict[str, Any]], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    judged = load(JudgedAnswers, write(tmp_path / "a.jsonl", rows), tokenizer)
    if rows is JUDGED:
        answers = [(row["prompt"], row["completion"], bool(row["label"])) for row in rows]
        earlier = ["eleven", "three", "seven eight"]
    else:
        answers = [(row["prompt"], row[name], name == "chosen") for row in rows for name in ("chosen", "rejected")]
        earlier = ["eleven", "twelve", "three", "four five", "seven eight", "nine"]
    assert len(judged) == len(answers)
    for found, (prompt, answer, is_desirable), other in zip(judged, answers, earlier, strict=True):
        assert found.tokens.tolist() == ids(tokenizer, prompt, answer)
        assert found.other.tokens.tolist() == ids(tokenizer, prompt, other)
        assert found.is_desirable is is_desirable and found.other.num_source_tokens == found.num_source_tokens
    scored = judged.with_reference(np.arange(2.0 * len(answers)).reshape(-1, 2))
    part = scored.part(1, 3)
    assert [each.other.tokens.tolist() for each in part] == [each.other.tokens.tolist() for each in list(judged)[1:3]]
    assert part.num_tokens == sum(len(each.tokens) for each in part) and part.part(1, 2)[0].reference == (4.0, 5.0)
    batch = collate_judged(list(part))
    assert batch.reference.tolist() == [2.0, 4.0] and batch.is_desirable.tolist() == [a[2] for a in answers[1:3]]
    assert batch.others is not None and batch.others.reference.tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (AnswerPairs, {"prompt": "a", "chosen": "b"}, "expected prompt, chosen, rejected; missing: rejected"),
        (AnswerPairs, JUDGED[0], "missing: chosen, rejected; for rows of judged answers, give --preference kto"),
        (AnswerPairs, {"src": "a", "tgt": "b"}, "found the fields src, tgt, expected prompt, chosen, rejected"),
        (AnswerPairs, {"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is int 3, expected text"),
        (AnswerPairs, {"prompt": "a", "chosen": " ", "rejected": "c"}, "the 'chosen' is empty"),
        (JudgedAnswers, {"prompt": "a", "completion": "b"}, "missing: label"),
        (
            JudgedAnswers,
            {"prompt": "a", "completion": "b", "label": "good"},
            "'label' is 'good', expected true or false",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    kind: type[ComparedSet], row: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [*(PAIRS if kind is AnswerPairs else JUDGED), row]
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: ") as error:
        load(kind, write(tmp_path / "a.jsonl", rows), tokenizer)
    assert message in str(error.value)


def test_one_row_is_too_few_for_kto(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="there is one row"):
        load(JudgedAnswers, write(tmp_path / "a.jsonl", PAIRS[:1]), tokenizer)


def test_a_template_builds_the_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = write(tmp_path / "a.jsonl", [{"question": "one", "chosen": "two", "rejected": "three"}])
    pairs = load(AnswerPairs, rows, tokenizer, prompt_template="Q: {question}")
    assert pairs[0].source_text == "Q: one" and pairs[0].target_text == "two"
