"""The protocols: their windows against lists written by hand, their numbers against naive computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bloomlm.api import load
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.config import make_config
from bloomlm.evaluation.data_sources import Passage, detokenize, read_passages, read_text, split_documents, split_rows
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.protocol import Plan, Totals, WindowPlan
from bloomlm.evaluation.protocols import gptq, lm_eval, reference
from bloomlm.evaluation.protocols.reference import sliding_windows
from bloomlm.evaluation.scoring.scorers import EagerScorer
from bloomlm.evaluation.scoring.windows import WindowScore
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from tests.bloom_tokenizer import make_tokenizer
from tests.tiny_checkpoint import random_model

PAD = 3
TEXT = (
    " \n = The Sea = \n \n The sea , and the rain @-@ fed river ; 1 @,@ 234 ( in all ) . \n \n = = Rain = = \n \n "
    'Rain and the sea \'s " sound " and the rain . \n = Ink = \n \n The ink ran . \n'
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> BloomForCausalLM:
    return random_model(BloomConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, n_layer=2, n_head=4))


def results(model: BloomForCausalLM, plan: WindowPlan, max_batch_tokens: int = 100) -> dict[str, Metric]:
    return plan.metrics(EagerScorer(model, max_batch_tokens=max_batch_tokens).score_all(plan.windows))


def plan_of(file: Path, tokenizer: Tokenizer, protocol: str) -> Plan:
    """The plan that the options ask for."""
    config = make_config({"eval_path": file, "protocol": protocol})
    plan: Plan = config.task.make_plan(config.task.read(file), tokenizer, limit=None, **config.task_options)
    return plan


def passages(*texts: str) -> list[Passage]:
    return [Passage(text=text, where=f"line {number}") for number, text in enumerate(texts, start=1)]


def naive_reference_loss(model: BloomForCausalLM, ids: list[int], seq_length: int, overlap: int) -> float:
    """The loss as in run_eval.py: every window padded to its full length, all logits, and a mask."""
    count = max(math.ceil(max(len(ids) - 1 - overlap, 0) / overlap) + 1, 1)
    total = 0.0
    for number in range(count):
        piece = ids[number * overlap : number * overlap + seq_length + 1]
        piece = piece + [PAD] * (seq_length + 1 - len(piece))
        tokens, labels = torch.tensor(piece[:-1]), torch.tensor(piece[1:])
        mask = (tokens != PAD).float()
        if overlap != seq_length and number != 0:
            mask[:-overlap] = 0.0
        log_probs = model(tokens[None])[0].detach().float().log_softmax(-1)
        total -= float((log_probs.gather(1, labels[:, None]).squeeze(1) * mask).sum())
    return total / (len(ids) - 1)


@pytest.mark.parametrize(("seq_length", "overlap"), [(16, 4), (16, 16), (16, 5), (500, 32)])
def test_reference_loss_is_that_of_padded_windows(
    model: BloomForCausalLM, tokenizer: Tokenizer, seq_length: int, overlap: int
) -> None:
    ids = tokenizer.encode(detokenize(TEXT))
    plan = reference.wikitext(TEXT, tokenizer, seq_length=seq_length, overlapping_eval=overlap)
    found = results(model, plan)
    loss = naive_reference_loss(model, ids, seq_length, overlap)
    words = len(TEXT.strip().split(" "))
    ratio = (len(ids) - 1) / (words - 1)
    assert found["avg_loss"].value == pytest.approx(loss, rel=1e-6)
    assert found["ppl"].value == pytest.approx(math.exp(min(20, loss)), rel=1e-5)
    assert found["adjusted_ppl"].value == pytest.approx(math.exp(min(20, loss * ratio)), rel=1e-5)
    assert plan.counts["token_ratio"] == ratio
    line = reference.wikitext_line(found, plan.counts)
    assert line.startswith(f"avg loss: {loss:.4E} | ppl: ")
    assert line.endswith(f"token ratio: {ratio} |")


def test_pads_in_the_text_predict_nothing(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    text = "the sea <pad> and <pad> the rain"
    ids = tokenizer.encode(text)
    assert ids.count(PAD) == 2
    found = results(model, reference.wikitext(text, tokenizer, seq_length=8, overlapping_eval=3))
    assert found["avg_loss"].value == pytest.approx(naive_reference_loss(model, ids, 8, 3), rel=1e-6)


def test_sliding_windows_by_hand() -> None:
    windows = sliding_windows(np.arange(10, 20), 6, 2, PAD)
    assert [(w.tokens.tolist(), w.labels.tolist()) for w in windows] == [
        ([10, 11, 12, 13, 14, 15], [11, 12, 13, 14, 15, 16]),
        ([12, 13, 14, 15, 16, 17], [17, 18]),
        ([14, 15, 16, 17, 18, 19], [19, PAD]),
    ]


def test_limit_takes_the_first_windows(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    whole = reference.wikitext(TEXT, tokenizer, seq_length=16, overlapping_eval=4)
    plan = reference.wikitext(TEXT, tokenizer, seq_length=16, overlapping_eval=4, limit=3)
    assert len(plan.windows) == 3 < len(whole.windows)
    scores = EagerScorer(model, max_batch_tokens=100).score_all(plan.windows)
    assert sum(score.num_scored for score in scores) == 16 + 2 * 4
    loss = -sum(score.log_prob for score in scores) / 24
    assert plan.metrics(scores)["avg_loss"].value == pytest.approx(loss)
    assert len(lm_eval.wikitext(TEXT, tokenizer, limit=1).windows) == 1
    assert len(gptq.wikitext(TEXT, tokenizer, seq_length=16, limit=2).windows) == 2


@pytest.mark.parametrize(("seq_length", "overlap"), [(16, 17), (16, 0)])
def test_overlap_that_leaves_tokens_out_is_refused(tokenizer: Tokenizer, seq_length: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"--overlapping_eval {overlap}"):
        reference.wikitext(TEXT, tokenizer, seq_length=seq_length, overlapping_eval=overlap)


def test_reference_lambada_needs_every_token_of_the_word(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    texts = ["the rain and the sea", "the sea and the rainfall  ", "the ink  the\n\nink", "and " * 40 + "the end"]
    plan = reference.lambada(passages(*texts), tokenizer, seq_length=20)
    assert plan.counts["contexts_cut"] == 1
    right = 0
    for text in texts:
        word = text.split()[-1]
        context = tokenizer.encode(text[: text.rfind(word)].strip())
        label = tokenizer.encode(" " + word)
        seen = (context + label)[:-1][-20:]
        likeliest = model(torch.tensor([seen]))[0].argmax(-1).tolist()[-len(label) :]
        right += likeliest == label
    found = results(model, plan)
    assert found["accuracy"].value == right / 4
    assert reference.lambada_line(found, plan.counts) == (
        f"number correct: {right:.4E} | total examples: 4.0000E+00 | avg accuracy: {right / 4:.4E}"
    )


def test_lambada_counts_right_answers() -> None:
    bloom = load("builtin:tiny", dtype="float32")
    texts = ["Returns the value of the value", "By default, this is set to ``True``,", "the sea and the rain"]
    plan = reference.lambada(passages(*texts), bloom.tokenizer)
    accuracy = results(bloom.model, plan)["accuracy"]
    assert accuracy.value == pytest.approx(2 / 3)
    assert accuracy.standard_error == pytest.approx(1 / 3)


def test_gptq_perplexity_is_the_mean_over_windows(model: BloomForCausalLM, tokenizer: Tokenizer) -> None:
    ids = torch.tensor(tokenizer.encode("\n\n".join(split_rows(TEXT))))
    losses = []
    for number in range(len(ids) // 16):
        window = ids[number * 16 : (number + 1) * 16]
        logits = model(window[None])[0].detach()
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
    plan = gptq.wikitext(TEXT, tokenizer, seq_length=16)
    found = results(model, plan)
    assert found["perplexity"].value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert plan.counts["tokens_left_out"] == len(ids) % 16


def test_rolling_windows_by_hand() -> None:
    windows = lm_eval.rolling_windows(list(range(10, 19)), 1, 4)
    assert [(w.tokens.tolist(), w.labels.tolist()) for w in windows] == [
        ([1, 10, 11, 12], [10, 11, 12, 13]),
        ([13, 14, 15, 16], [14, 15, 16, 17]),
        ([14, 15, 16, 17], [18]),
    ]
    assert lm_eval.rolling_windows([], 1, 4) == []
    short = lm_eval.rolling_windows([5, 6], 1, 4)
    assert [(w.tokens.tolist(), w.labels.tolist()) for w in short] == [([1, 5], [5, 6])]


def test_pairs_are_cut_out_of_both_together(tokenizer: Tokenizer) -> None:
    (moved, empty, prefixed) = lm_eval.encode_pairs([("the sea  ", " and"), ("", "and"), ("", "<s>and")], tokenizer)
    assert moved == (tokenizer.encode("the sea"), tokenizer.encode("the sea   and")[len(tokenizer.encode("the sea")) :])
    assert empty == ([1], tokenizer.encode("and"))
    assert prefixed == ([1], tokenizer.encode("and"))


def test_detokenizer_undoes_the_marks() -> None:
    cases = {
        "well @-@ known 1 @,@ 234 @.@ 5": "well-known 1,234.5",
        "a ( b ) [ c ] { d } , e . f ; g": "a (b) [c] {d}, e. f; g",
        "the dogs ' bone": "the dogs' bone",
        'the dog \'s " big " bone': 'the dog\'s "big" bone',
        "a ' big ' bone": "a 'big' bone",
        "= = = = Deep = = = = \n next": "==== Deep ====\nnext",
        "5 \N{DEGREE SIGN} C , N people": "5\N{DEGREE SIGN}C, 1 people",
        "x N y": "x 1 y",
    }
    assert {text: detokenize(text) for text in cases} == cases


def test_documents_begin_at_main_headings() -> None:
    documents = split_documents(TEXT)
    assert [document.split("\n")[0] for document in documents] == [" = The Sea = ", " = Ink = "]
    assert " \n" + "\n".join(documents) == TEXT


def test_rows_are_lines_with_blank_ones_empty() -> None:
    assert split_rows(" \n = A = \n\nb \n") == ["", " = A = \n", "", "b \n"]
    assert split_rows("a\u2028b\nlast") == ["a\u2028b\n", "last"]


def test_unknown_words_are_noticed(tokenizer: Tokenizer) -> None:
    assert "2 words" in lm_eval.wikitext(TEXT + "<unk> and <unk>", tokenizer).notices[0]
    assert lm_eval.wikitext(TEXT, tokenizer).notices == ()


def test_empty_and_unreadable_texts_are_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "wiki.tokens"
    with pytest.raises(DataError, match="cannot be read"):
        read_text(file)
    file.write_text(" \n\n")
    with pytest.raises(DataError, match="no text in it"):
        read_text(file)
    file.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"not UTF-8 .byte 0xff at 2"):
        read_text(file)
    with pytest.raises(DataError, match="1 words; expected at least two"):
        reference.wikitext("sea", tokenizer)
    with pytest.raises(DataError, match="fewer than one window of 2048"):
        gptq.wikitext(TEXT, tokenizer)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a b"', "line 2: not JSON"),
        ('{"txt": "a b"}', "line 2: expected an object such as .*found the fields txt"),
        ('{"text": 5}', "line 2: .*found text 5"),
        ('{"text": "  "}', "line 2: .*found text '  '"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "lambada.jsonl"
    file.write_text(json.dumps({"text": "the sea"}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=words):
        read_passages(file)


def test_passages_without_context_or_word_are_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="line 2: no context before the last word"):
        reference.lambada(passages("the sea", "sea"), tokenizer)
    file = tmp_path / "empty.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="no passages in it"):
        read_passages(file)


def test_defaults_of_lengths_are_the_protocols(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "wiki.tokens"
    file.write_text(TEXT * 60)
    plans = {name: plan_of(file, tokenizer, name) for name in ("reference", "lm_eval", "gptq")}
    assert plans["reference"].settings == {"seq_length": 512, "overlapping_eval": 32}
    assert plans["lm_eval"].settings == plans["gptq"].settings == {"seq_length": 2048}
    with pytest.raises(ConfigError, match="no LAMBADA"):
        file = tmp_path / "l.jsonl"
        file.write_text('{"text": "the sea"}\n')
        plan_of(file, tokenizer, "gptq")


def test_totals_leave_out_what_is_not_scored() -> None:
    scores = [
        WindowScore(log_prob=-2.0, num_scored=2, num_likeliest=2),
        WindowScore(log_prob=0.0, num_scored=0, num_likeliest=0),
        WindowScore(log_prob=-1.0, num_scored=1, num_likeliest=0),
    ]
    assert Totals().plus(scores[:1]).plus(scores[1:]) == Totals(
        log_prob=-3.0, num_scored=3, num_windows=2, num_greedy=1
    )
    assert IGNORE_INDEX == -100
