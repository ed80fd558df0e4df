"""Scores of given tokens against whole logits, by value."""

import math

import pytest
import torch

from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_scores import score_labels

VOCAB = 101


@pytest.mark.parametrize("block_columns", [1, 7, 100, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_softmax_of_whole_logits(dtype: torch.dtype, block_columns: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 16, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, 16, generator=generator).to(dtype)
    logits = hidden @ weight.t()
    labels = torch.randint(VOCAB, (13,), generator=generator)
    labels[::2] = logits.argmax(dim=1)[::2]
    labels[1], labels[3] = 0, VOCAB - 1
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    scores = score_labels(hidden, Head(weight), labels, block_columns=block_columns)
    expected = logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(scores.log_probs, expected)
    assert scores.is_likeliest.tolist() == (logits.argmax(dim=1) == labels).tolist()
    assert 7 <= scores.is_likeliest.sum() < 13


@pytest.mark.parametrize("block_columns", [1, 2, None])
def test_of_equally_likely_tokens_the_first_is_the_likeliest(block_columns: int | None) -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    scores = score_labels(torch.ones(3, 1), Head(weight), torch.tensor([0, 1, 2]), block_columns=block_columns)
    assert scores.is_likeliest.tolist() == [False, True, False]


@pytest.mark.parametrize("block_columns", [1, None])
def test_large_logits_neither_overflow_nor_vanish(block_columns: int | None) -> None:
    weight = torch.tensor([[-2000.0], [0.0], [3000.0]])
    scores = score_labels(torch.ones(3, 1), Head(weight), torch.tensor([0, 1, 2]), block_columns=block_columns)
    assert scores.log_probs.tolist() == [-5000.0, -3000.0, 0.0]


def test_autocast_multiplies_in_its_format() -> None:
    hidden, weight = torch.full((1, 1), 1.0), torch.tensor([[1.001], [0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = score_labels(hidden, Head(weight), torch.tensor([0])).log_probs.tolist()
    assert found == pytest.approx(-math.log1p(math.exp(-1.0)))  # bfloat16 has no 1.001
    (exact,) = score_labels(hidden, Head(weight), torch.tensor([0])).log_probs.tolist()
    assert exact == pytest.approx(-math.log1p(math.exp(-1.001)), rel=1e-6)


def test_no_row_gives_no_score_and_no_gradient_is_kept() -> None:
    weight = torch.zeros(VOCAB, 4, requires_grad=True)
    assert len(score_labels(torch.zeros(0, 4), Head(weight), torch.zeros(0, dtype=torch.int64)).log_probs) == 0
    assert not score_labels(torch.zeros(2, 4), Head(weight), torch.tensor([0, 1])).log_probs.requires_grad
