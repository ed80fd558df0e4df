"""Log-probabilities of tokens in the distribution of the model itself, before any option acts on it.

Shapes: B positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_POSITIONS_AT_ONCE = 16  # bounds the memory beside the logits


class TokenScore(NamedTuple):
    """How likely a token is after the tokens before it."""

    log_prob: float
    """Natural logarithm of its probability."""
    top_log_probs: tuple[tuple[int, float], ...]
    """The likeliest ids at its place with their log-probabilities, likeliest first; as many as were asked for."""


PromptScores = list[TokenScore | None]
"""The scores of a prompt's tokens; None for the first, which no token precedes."""


def log_probs_of(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Score one token at each position.

    Args:
        logits: [B, V] of the model.
        tokens: B ids.
        num_top: number of likeliest ids to name at each position; 0 names none.

    Returns:
        B scores, by log_softmax in float32.
    """
    scores: list[TokenScore] = []
    for part, ids in zip(
        logits.split(_POSITIONS_AT_ONCE),
        torch.tensor(tokens, device=logits.device).split(_POSITIONS_AT_ONCE),
        strict=True,
    ):
        log_probs = part.float().log_softmax(dim=-1)
        own = log_probs.gather(1, ids[:, None]).squeeze(1)
        values, places = log_probs.topk(min(num_top, log_probs.shape[-1]), dim=-1)
        for log_prob, top_ids, top in zip(own.tolist(), places.tolist(), values.tolist(), strict=True):
            scores.append(TokenScore(log_prob, tuple(zip(top_ids, top, strict=True))))
    return scores
