"""Scores of generated answers, by value."""

import math
import sys

import pytest

from bloomlm.errors import ConfigError
from bloomlm.evaluation.answer_scores import bleu_tokenizer, score_generations, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, the CAT!", ["the", "cat", "the", "cat"]),
        ("2024-03-05", ["2024", "03", "05"]),
        ("Straße, 3. März", ["straße", "3", "märz"]),
        ("三月三日 GPT2模型", ["三", "月", "三", "日", "gpt2", "模", "型"]),
        ("ひらがな", ["ひ", "ら", "が", "な"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("١٥ يناير", ["١٥", "يناير"]),
        ("。、！?", []),
    ],
)
def test_words_of_all_scripts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_scores_by_hand() -> None:
    scores = score_generations(["the cat sat", " a b "], ["the cat sat on the mat", "a b"])
    # first pair: 3 words against 6, all in order: P 1, R 1/2, F 2/3; pairs: 2 against 5: P 1, R 2/5, F 4/7
    assert scores.exact_match == 0.5
    assert scores.rouge1 == pytest.approx((2 / 3 + 1) / 2)
    assert scores.rouge2 == pytest.approx((4 / 7 + 1) / 2)
    assert scores.rougeL == pytest.approx((2 / 3 + 1) / 2)
    # n-grams found / there: 5/5, 3/3, 1/1, 0/0 (no 4-gram in any answer, so BLEU-4 is 0 by definition)
    assert scores.bleu4 == 0.0


def test_bleu_by_hand() -> None:
    scores = score_generations(["a b c d e"], ["a b c d x"])
    # 4/5, 3/4, 2/3, 1/2; as long as the reference, so no brevity penalty
    assert scores.bleu4 == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    shorter = score_generations(["a b c d"], ["a b c d x"])
    assert shorter.bleu4 == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert "tok:13a" in scores.bleu4_signature


def test_chrf_by_hand() -> None:
    scores = score_generations(["abc"], [" abd"])
    # of 1, 2 and 3 characters 2/3, 1/2 and 0 are right, of more there are none: means over what there is, and F2 of
    # equal precision and recall is either
    assert scores.chrf == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_bleu_and_rouge_of_chinese() -> None:
    scores = score_generations(["今天天气很好"], ["今天天气不好"])
    # characters: 5 of 6; pairs 3 of 5; triples 2 of 4; 4-grams 1 of 3
    assert scores.rouge1 == pytest.approx(5 / 6)
    assert scores.rouge2 == pytest.approx(3 / 5)
    assert scores.bleu4 == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:zh" in scores.bleu4_signature


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (["hello", "世界"], "13a"),
        (["世界 ok"], "13a"),
        (["世界"], "zh"),
        (["これは"], "char"),
        (["ไทย"], "char"),
        (["1"], "13a"),
    ],
)
def test_bleu_tokenizer_follows_the_script(references: list[str], tokenizer: str) -> None:
    assert bleu_tokenizer(references) == tokenizer


def test_perfect_and_empty_answers() -> None:
    perfect = score_generations(["1950-01-15"], ["1950-01-15"])
    assert perfect.numbers() == pytest.approx(
        {"exact_match": 1.0, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "bleu4": 100.0, "chrf": 100.0}
    )
    assert set(score_generations([""], ["1950-01-15"]).numbers().values()) == {0.0}


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"bloomlm\[metrics\]"):
        score_generations(["a"], ["a"])
