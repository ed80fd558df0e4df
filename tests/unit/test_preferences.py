"""Rows of preferences: which fields they have, how they are cut, and which answers are compared."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bloomlm.data.answer_batch import collate_judged, collate_pairs
from bloomlm.data.chat_template import PLAIN_TEMPLATE
from bloomlm.data.files import FileRows
from bloomlm.data.message_answers import load_message_answers
from bloomlm.data.preferences import AnswerPairs, ComparedSet, JudgedAnswers, load_text_answers
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
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
    return kind.load(rows, lambda fields: load_text_answers(rows, tokenizer, fields=fields, **settings | options))


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


MESSAGES = {
    "prompt": [{"role": "user", "content": "one"}],
    "chosen": [{"role": "assistant", "content": "two"}],
    "rejected": [{"role": "assistant", "content": "three"}],
}
WHOLE = {name: MESSAGES["prompt"] + MESSAGES[name] for name in ("chosen", "rejected")}


def load_messages(kind: type[ComparedSet], rows: FileRows, tokenizer: Tokenizer, max_length: int = 100) -> Any:
    def read(fields: tuple[str, ...]) -> Any:
        options: dict[str, Any] = {"max_length": max_length, "cache_dir": rows.path.parent / "cache"}
        return load_message_answers(rows, tokenizer, fields=fields, show_progress=False, **options)

    return kind.load(rows, read)


@pytest.mark.parametrize("row", [MESSAGES, WHOLE, {"prompt": "one", **WHOLE}], ids=["explicit", "implicit", "repeated"])
def test_messages_become_texts_by_the_template(row: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = tokenizer.with_chat_template(PLAIN_TEMPLATE)
    (pair,) = load_messages(AnswerPairs, write(tmp_path / "a.jsonl", [row]), plain)
    assert tokenizer.decode(pair.tokens, skip_special_tokens=False) == "User: one\nAssistant: two</s>"
    assert tokenizer.decode(pair.other.tokens, skip_special_tokens=False) == "User: one\nAssistant: three</s>"
    assert (pair.source_text, pair.target_text) == ("User: one\nAssistant:", " two")
    assert pair.num_source_tokens == pair.other.num_source_tokens == len(tokenizer.encode_batch([pair.source_text])[0])
    judged = load_messages(JudgedAnswers, write(tmp_path / "a.jsonl", [row, row]), plain)
    assert [each.is_desirable for each in judged] == [True, False, True, False]


def test_cuts_are_warned_of(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    longer = {**MESSAGES, "prompt": [{"role": "user", "content": "one two three four five six seven"}]}
    plain = tokenizer.with_chat_template(PLAIN_TEMPLATE)
    start = len(tokenizer.encode_batch(["User: one\nAssistant:"])[0])
    rows = write(tmp_path / "a.jsonl", [MESSAGES, longer])
    (pair,) = load_messages(AnswerPairs, rows, plain, start + 3)
    assert len(pair.tokens) == len(pair.other.tokens) == start + 3
    assert f"2 cut to max_length {start + 3} tokens with their prompts, and 1 row left out" in caplog.text
    with pytest.raises(DataError, match=r"every prompt has max_length 3 tokens or more; raise --max_length"):
        load_messages(AnswerPairs, rows, plain, 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIRS[0], "'chosen' is 'three'; expected a list of messages"),
        ({**MESSAGES, "rejected": "no"}, "'rejected' is 'no'; expected a list of messages"),
        ({**MESSAGES, "chosen": []}, "'chosen' is []; expected a list of messages"),
        ({**MESSAGES, "prompt": "one"}, "'chosen' and 'rejected' begin with different messages"),
        ({**WHOLE, "prompt": "two"}, "'prompt' is 'two', and no message with which 'chosen' and 'rejected' begin"),
        ({"prompt": MESSAGES["prompt"]}, "found the fields prompt, expected prompt, chosen, rejected; missing: chosen"),
        ({**MESSAGES, "chosen": MESSAGES["prompt"]}, "no message of 'chosen' is the assistant's"),
        ({**MESSAGES, "chosen": [{"role": "bing", "content": "a"}]}, "chosen[0]: 'role' is 'bing'; expected one of"),
        ({**MESSAGES, "tools": [{}]}, "found 'tools'"),
        (
            {**MESSAGES, "prompt": [*MESSAGES["prompt"], {"role": "system", "content": "a"}]},
            "the chat template does not",
        ),
        ({**MESSAGES, "chosen": [{"role": "assistant", "content": "hide"}]}, "leaves out an"),
    ],
)
def test_messages_that_cannot_be_used_are_named(
    row: dict[str, Any], message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    template = "{% if messages[-1].content != 'hide' %}" + PLAIN_TEMPLATE + "{% else %}User: one\nAssistant:{% endif %}"
    rows = write(tmp_path / "a.jsonl", [MESSAGES, row])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2[:,]") as error:
        load_messages(AnswerPairs, rows, tokenizer.with_chat_template(template))
    assert message in str(error.value)


def test_texts_among_messages_and_messages_among_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"line 4: 'prompt' is list .*, expected text"):
        load(AnswerPairs, write(tmp_path / "a.jsonl", [*PAIRS, MESSAGES]), tokenizer)
    judged = {"prompt": MESSAGES["prompt"], "completion": MESSAGES["chosen"], "label": True}
    with pytest.raises(DataError, match=r"line 2: 'completion' is 'three'; expected a list of messages"):
        plain = tokenizer.with_chat_template(PLAIN_TEMPLATE)
        load_messages(JudgedAnswers, write(tmp_path / "a.jsonl", [judged, {**judged, "completion": "three"}]), plain)
    with pytest.raises(ConfigError, match=r"a\.jsonl holds conversations, and .* has no chat template"):
        load_messages(AnswerPairs, write(tmp_path / "a.jsonl", [MESSAGES]), tokenizer)
