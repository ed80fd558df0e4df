"""Each function on logits gives the values of transformers' logits processor of the same name."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.rows import History
from bloomlm.generation.sampling import (
    apply_repetition_penalty,
    apply_temperature,
    ban_repeated_ngrams,
    ban_tokens,
    choose,
    keep_top_k,
    keep_top_p,
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


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 6, 0.8), (1.6, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.7), (2.0, 3, 0.9)]
)
def test_choose_warps_in_transformers_order(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits()
    warped = theirs.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = theirs.TopKLogitsWarper(top_k)(None, warped)
    warped = theirs.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    strategy = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    for uniform in torch.linspace(0, 0.999, 31, dtype=torch.float64):
        uniforms = uniform.expand(4)
        equal(choose(logits, strategy, uniforms), sample(warped, uniforms))


def test_choose_takes_the_first_of_equals() -> None:
    assert choose(torch.tensor([[1.0, 5.0, 5.0]]), None, None).tolist() == [1]


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
