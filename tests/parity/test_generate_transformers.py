"""Greedy and beam search give the ids of transformers' generate on the same weights."""

from typing import Any

import pytest
import torch

from bloomlm.generation.config import BeamSearch, GenerationConfig
from bloomlm.generation.generate import Generation, generate
from tests.parity.conftest import make_pair

PROMPTS = [[5, 17, 9], [44, 8, 21, 60, 33, 7, 12], [90]]


def eos_prone_pair(seed: int, scale: float, **kwargs: Any) -> tuple[Any, Any]:
    """A pair whose </s> wins now and then: its (tied) embedding row is scaled."""
    theirs, ours = make_pair(seed=seed, **kwargs)
    with torch.no_grad():
        for weight in (theirs.transformer.word_embeddings.weight, ours.transformer.word_embeddings.weight):
            weight[2] *= scale
    return theirs, ours


def their_ids(theirs: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """One prompt at a time, so that nothing of theirs depends on pads; without the prompt, and cut after </s>."""
    results = []
    for prompt in prompts:
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            eos_token_id=2,
            pad_token_id=3,
            do_sample=False,
            **options,
        )
        for row in output[:, len(prompt) :].tolist():
            results.append(row[: row.index(2) + 1] if 2 in row else row)
    return results


def our_ids(results: list[Generation]) -> list[list[int]]:
    for result in results:
        assert (result.finish_reason == "eos") == (result.tokens[-1] == 2)
    return [result.tokens for result in results]


def test_greedy_equals_transformers() -> None:
    ends = 0
    for seed in range(8):
        theirs, ours = eos_prone_pair(seed, 4.0, n_head=4 if seed % 4 > 1 else 6, post_layernorm=seed == 5)
        expected = their_ids(theirs, PROMPTS, max_new_tokens=20)
        assert our_ids(generate(ours, PROMPTS, GenerationConfig(max_new_tokens=20))) == expected
        ends += sum(1 < len(tokens) < 20 for tokens in expected)
    assert ends >= 3  # rows finished before others, so dropping them was exercised


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 12},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 6},
    ],
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_options_equal_transformers(options: dict[str, Any], num_beams: int) -> None:
    for seed in (2, 5, 6):
        theirs, ours = eos_prone_pair(seed, scale=3.0)
        expected = their_ids(theirs, PROMPTS, max_new_tokens=16, num_beams=num_beams, **options)
        beams = {} if num_beams == 1 else {"strategy": BeamSearch(num_beams=num_beams)}
        config = GenerationConfig(max_new_tokens=16, **beams, **options)
        assert our_ids(generate(ours, PROMPTS, config)) == expected


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(("num_beams", "returned"), [(2, 1), (4, 4), (5, 2)])
def test_beam_search_equals_transformers(num_beams: int, returned: int, length_penalty: float) -> None:
    ends = 0
    for seed in (1, 3, 5, 6):
        theirs, ours = eos_prone_pair(seed, scale=4.0, n_head=6 if seed % 2 else 4)
        expected = their_ids(
            theirs,
            PROMPTS,
            max_new_tokens=12,
            num_beams=num_beams,
            num_return_sequences=returned,
            length_penalty=length_penalty,
        )
        config = GenerationConfig(
            strategy=BeamSearch(num_beams=num_beams, length_penalty=length_penalty),
            num_return_sequences=returned,
            max_new_tokens=12,
        )
        found = our_ids(generate(ours, PROMPTS, config))
        assert found == expected
        ends += sum(tokens[-1] == 2 and 1 < len(tokens) < 12 for tokens in found)
    assert ends > 0  # </s> came in the middle, so closing and dropping prompts was exercised
