"""The tokens and learned tokens of answers that are messages equal TRL's, as record_trl_answers.py recorded them."""

import json
from pathlib import Path
from typing import Any

import pytest

from bloomlm.data.example import Example
from bloomlm.data.files import FileRows
from bloomlm.data.message_answers import COMPLETION_FIELDS, load_message_answers
from bloomlm.data.preferences import AnswerPairs, JudgedAnswers
from bloomlm.data.rows import JUDGED_FIELDS, PAIR_FIELDS
from tests.bloom_tokenizer import make_tokenizer
from tests.parity.record_trl_answers import FIXTURE, MAX_LENGTH, PAIRS, ROWS, TEMPLATES

FIELDS = {"pairs": PAIR_FIELDS, "implicit": PAIR_FIELDS, "judged": JUDGED_FIELDS, "completions": COMPLETION_FIELDS}


def load(kind: str, template: str, max_length: int, directory: Path) -> Any:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]), encoding="utf-8")
    options: dict[str, Any] = {"max_length": max_length, "cache_dir": directory}
    tokenizer = make_tokenizer().with_chat_template(TEMPLATES[template])
    return load_message_answers(FileRows(path), tokenizer, fields=FIELDS[kind], **options)


def as_recorded(example: Example) -> dict[str, list[int]]:
    start, stop = example.learned[-1]
    assert stop == len(example.tokens) and len(example.learned) == 1
    return {"tokens": example.tokens.tolist(), "learned": [0] * start + [1] * (stop - start)}


@pytest.mark.parametrize("max_length", [None, MAX_LENGTH])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ROWS)
def test_tokens_equal_those_of_trl(kind: str, template: str, max_length: int | None, tmp_path: Path) -> None:
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))["answers"][f"{kind} {template} {max_length}"]
    for _ in range(2):  # tokenised, then from the cache
        answers = load(kind, template, max_length or 1000, tmp_path)
        assert list(map(as_recorded, answers)) == recorded


def test_a_row_whose_prompt_is_too_long_takes_its_label_away(tmp_path: Path) -> None:
    answers = load("judged", "plain", MAX_LENGTH, tmp_path)
    assert answers.report.left_out == (3,) and len(answers) == len(PAIRS) - 1
    judged = JudgedAnswers.load(FileRows(tmp_path / "rows.jsonl"), lambda fields: answers)
    assert [each.is_desirable for each in judged] == [True, False, True, True]
    pairs = AnswerPairs.load(
        FileRows(tmp_path / "rows.jsonl"), lambda fields: load("pairs", "plain", MAX_LENGTH, tmp_path)
    )
    assert [pair.tokens.tolist() for pair in pairs] == [answer.tokens.tolist() for answer in answers]
