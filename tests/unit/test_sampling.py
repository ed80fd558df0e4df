"""Each function on logits gives the values of transformers' logits processor of the same name."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.rows import History
from bloomlm.generation.sampling import (
    add_bias,
    apply_count_penalties,
    apply_repetition_penalty,
    apply_temperature,
    ban_repeated_ngrams,
    ban_tokens,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    most_likely,
    sample,
    uniform_numbers,
)

V = 23


def random_logits(rows: int = 4, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def random_history(rows: int = 4, length: int = 9, ids: int = 5) -> Tensor:
    return torch.randint(0, ids, (rows, length), generator=torch.Generator().manual_seed(1))


WHOLE = torch.full((4,), 9)
"""Lengths of rows without pads."""


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature: float) -> None:
    logits = random_logits()
    equal(apply_temperature(logits, temperature), theirs.TemperatureLogitsWarper(temperature)(None, logits))


@pytest.mark.parametrize("top_k", [1, 5, V, V + 10])
def test_top_k_keeps_ties(top_k: int) -> None:
    logits = random_logits()
    logits[0, 3] = logits[0, 7] = logits[0].max()
    equal(keep_top_k(logits, top_k), theirs.TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p(top_p: float) -> None:
    logits = random_logits()
    equal(keep_top_p(logits, top_p), theirs.TopPLogitsWarper(top_p)(None, logits))


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = keep_top_p(logits, 0.6).isfinite()
    assert kept.tolist() == [[True, True, False]]


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [0, 40])
def test_top_p_removes_the_tokens_that_a_sort_with_places_removes(spread: float, ties: bool, top_k: int) -> None:
    """The definition, by transformers' code, on rows as long as BLOOM's, and with equal logits at the limit."""
    logits = spread * torch.randn(3, 250_880, generator=torch.Generator().manual_seed(5))
    logits = logits.mul(20).round().div(20) if ties else logits
    logits = keep_top_k(logits, top_k) if top_k else logits
    for top_p in (0.05, 0.5, 0.9, 0.99):
        equal(keep_top_p(logits, top_p), theirs.TopPLogitsWarper(top_p)(None, logits))


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
def test_min_p(min_p: float) -> None:
    logits = random_logits()
    equal(keep_min_p(logits, min_p), theirs.MinPLogitsWarper(min_p)(None, logits))


def test_draw_applies_min_p_to_the_distribution_of_the_temperature() -> None:
    logits = random_logits()
    warped = theirs.MinPLogitsWarper(0.3)(None, theirs.TemperatureLogitsWarper(3.0)(None, logits))
    warped = theirs.TopPLogitsWarper(0.8)(None, warped)
    strategy = Sampling(temperature=3.0, min_p=0.3, top_p=0.8)
    for uniform in torch.linspace(0, 0.999, 31, dtype=torch.float64):
        equal(draw(logits, strategy, uniform.expand(4)), sample(warped, uniform.expand(4)))


@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.25), (-0.25, 2.0)])
def test_count_penalties(frequency: float, presence: float) -> None:
    logits = random_logits(3)
    generated = [[3, 3, 7, 3], [], [22, 0, 22]]
    expected = logits.numpy().copy()
    for row, tokens in zip(expected, generated, strict=True):
        for token in range(V):
            row[token] -= frequency * tokens.count(token) + presence * (token in tokens)
    tokens = [torch.tensor(own, dtype=torch.int64) for own in generated]
    before = logits.clone()
    found = apply_count_penalties(logits, tokens, frequency, presence)
    equal(found, torch.from_numpy(expected))
    equal(logits, before)


def test_bias() -> None:
    logits = random_logits()
    expected = theirs.SequenceBiasLogitsProcessor([[[3], 1.5], [[7], -100.0]])(random_history(), logits.clone())
    equal(add_bias(logits, ((3, 1.5), (7, -100.0))), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.4])
def test_repetition_penalty(penalty: float) -> None:
    logits, history = random_logits(), random_history()
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(history, logits)
    equal(apply_repetition_penalty(logits, history, WHOLE, penalty), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 9, 10])
def test_no_repeat_ngram(size: int) -> None:
    logits, history = random_logits(), random_history()
    expected = theirs.NoRepeatNGramLogitsProcessor(size)(history, logits)
    equal(ban_repeated_ngrams(logits, history, WHOLE, size), expected)


def test_no_repeat_ngram_bans_every_continuation_of_the_suffix() -> None:
    history = torch.tensor([[7, 1, 7, 2, 7]])
    found = ban_repeated_ngrams(torch.zeros(1, 9), history, torch.tensor([5]), 2)
    assert found.isinf().nonzero()[:, 1].tolist() == [1, 2]


def test_min_new_tokens() -> None:
    logits = random_logits()
    ours = ban_tokens(logits, [2], range(4))
    equal(ours, theirs.MinNewTokensLengthLogitsProcessor(9, 3, 2)(random_history(), logits))
    assert logits.isfinite().all()  # the input is left alone
    assert ban_tokens(logits, [2], [1, 3]).isinf().nonzero().tolist() == [[1, 2], [3, 2]]


@pytest.mark.parametrize("num_pads", [1, 4])
def test_pads_are_not_history(num_pads: int) -> None:
    """A padded row gets the values of the same row without pads, whatever the pads hold."""
    logits, history = random_logits(1), random_history(1)
    lengths = torch.tensor([9])
    for pad_id in (0, 3, 20):
        padded = torch.cat((history, torch.full((1, num_pads), pad_id)), dim=1)
        for size in (1, 2, 3):
            equal(
                ban_repeated_ngrams(logits, padded, lengths, size),
                ban_repeated_ngrams(logits, history, lengths, size),
            )
        equal(
            apply_repetition_penalty(logits, padded, lengths, 1.5),
            apply_repetition_penalty(logits, history, lengths, 1.5),
        )


ROWS = [2, 0]


def test_history_applies_the_options_in_transformers_order() -> None:
    prompts = [[4, 1, 4, 1], [1, 2, 3, 4]]
    history = History(3, 7)
    for row, prompt in zip(ROWS, prompts, strict=True):
        history.start(row, prompt)
        history.append(row, prompt[0])
    config = GenerationConfig(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=2)
    logits = random_logits(2)
    expected = theirs.LogitsProcessorList(
        [
            theirs.RepetitionPenaltyLogitsProcessor(1.3),
            theirs.NoRepeatNGramLogitsProcessor(2),
            theirs.MinNewTokensLengthLogitsProcessor(4, 2, 2),
        ]
    )
    ids = torch.tensor([[*prompts[0], 4], [*prompts[1], 1]])
    equal(history.adjust(logits, ROWS, config, 2), expected(ids, logits))
    history.append(ROWS[1], 2)
    found = history.adjust(logits, ROWS, GenerationConfig(min_new_tokens=2), 2)
    assert found.isinf().nonzero().tolist() == [[0, 2]]


def test_history_counts_generated_tokens_only_and_adds_the_bias_first() -> None:
    history = History(3, 7)
    for row, prompt in zip(ROWS, ([4, 1, 4, 1], [1, 2, 3, 4]), strict=True):
        history.start(row, prompt)
        history.append(row, 9)
        history.append(row, prompt[0])
    config = GenerationConfig(
        logit_bias=((9, 2.0), (4, -3.0)),
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        min_new_tokens=3,
        stop_token_ids=(11,),
    )
    logits = random_logits(2)
    expected = logits.clone()
    for row, prompt in zip(expected, ([4, 1, 4, 1], [1, 2, 3, 4]), strict=True):
        row[9], row[4] = row[9] + 2.0, row[4] - 3.0
        for token in {*prompt, 9}:
            row[token] = row[token] * 1.5 if row[token] < 0 else row[token] / 1.5
        for token in (9, prompt[0]):
            row[token] -= 0.75
        row[2] = row[11] = -torch.inf
    torch.testing.assert_close(history.adjust(logits, ROWS, config, 2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 6, 0.8), (1.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (2.0, 3, 0.9)]
)
def test_draw_warps_in_transformers_order(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits()
    warped = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = theirs.TopKLogitsWarper(top_k)(None, warped)
    warped = theirs.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    strategy = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for uniform in torch.linspace(0, 0.999, 31, dtype=torch.float64):
        uniforms = uniform.expand(4)
        equal(draw(logits, strategy, uniforms), sample(warped, uniforms))


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    parts = [torch.tensor([[1.0, 5.0, 5.0], [9.0, 9.0, 9.0]]), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.bfloat16)]
    assert most_likely(parts) == [1, 0, 2]


def test_sample_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.0, 0.2, 0.3, 0.0, 0.5, 0.0]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.9, np.nextafter(1, 0)], dtype=torch.float64)
    assert sample(logits, uniforms).tolist() == [1, 1, 2, 2, 4, 4, 4]


def test_sample_follows_the_softmax() -> None:
    logits = random_logits(1)
    uniforms = uniform_numbers(0, [0], 20_000)[0]
    ids = sample(logits.expand(len(uniforms), -1), uniforms)
    frequencies = ids.bincount(minlength=V) / len(ids)
    torch.testing.assert_close(frequencies, logits.softmax(-1)[0], rtol=0, atol=0.012)


def test_uniform_numbers_depend_on_seed_and_sequence_only() -> None:
    rows = uniform_numbers(5, [0, 1, 2], 6)
    equal(uniform_numbers(5, [2, 0], 6), rows[[2, 0]])
    equal(uniform_numbers(5, [1], 4), rows[1:2, :4])
    assert len({round(x, 12) for x in rows.flatten().tolist()}) == 18
    assert (uniform_numbers(6, [0], 6) != rows[:1]).all()
    # neighbours in seed and sequence must not share a stream
    assert (uniform_numbers(4, [1], 6) != rows[:1]).all()
