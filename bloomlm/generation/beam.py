"""The state of a beam search for one prompt: scores and tokens, without the model.

The search is that of transformers (early_stopping False). Each step takes the 2 * W likeliest continuations. Of the
first W, those that end are kept as finished; the best W that do not end go on. The search closes when its best
unfinished beam, at its present length, cannot beat its worst finished one.

Shapes: W beams, V vocabulary, M new tokens at most.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_NEVER = -1.0e9  # a log-probability lower than that of any real continuation


class BeamSearchState:
    """The running and the finished continuations of a prompt."""

    def __init__(
        self,
        num_beams: int,
        max_new_tokens: int,
        *,
        eos_token_id: int | None,
        length_penalty: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.eos_token_id = eos_token_id
        self.length_penalty = length_penalty
        self.num_generated = 0
        self.is_open = True
        """Whether a running beam may still become one of the W finished ones."""
        self.tokens = torch.zeros(num_beams, max_new_tokens, dtype=torch.int64, device=device)
        """[W, M] tokens of the running beams, num_generated of them filled."""
        self.scores = torch.full((num_beams,), _NEVER, device=device)
        """[W] log-probabilities of the running beams. At first all beams are equal, so only one of them counts."""
        self.scores[0] = 0.0
        self.finished_tokens = torch.zeros_like(self.tokens)
        self.finished_lengths = torch.zeros(num_beams, dtype=torch.int64, device=device)
        self.finished_scores = torch.full((num_beams,), _NEVER, device=device)
        """[W] log-probability / length ** length_penalty, best first."""

    def advance(self, log_probs: Tensor, ends: Callable[[list[int]], bool] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            log_probs: [W, V] of the next token of each running beam.
            ends: from the tokens of a candidate, whether it contains a stop text.

        Returns:
            The beams [W] that the new running beams continue, and their new tokens [W].
        """
        totals = log_probs + self.scores[:, None]
        scores, flat = totals.flatten().topk(2 * self.num_beams)
        parents, ids = flat // log_probs.shape[-1], flat % log_probs.shape[-1]
        candidates = self.tokens[parents]
        candidates[:, self.num_generated] = ids
        self.num_generated += 1

        ended = torch.zeros_like(ids, dtype=torch.bool)
        if self.eos_token_id is not None:
            ended |= ids == self.eos_token_id
        if ends is not None:
            ended |= torch.tensor([ends(c) for c in candidates[:, : self.num_generated].tolist()], device=ids.device)
        if self.num_generated == self.max_new_tokens:
            ended = torch.ones_like(ended)
        self._finish(candidates, scores, ended)

        scores, going_on = torch.where(ended, scores + _NEVER, scores).topk(self.num_beams)
        self.tokens, self.scores = candidates[going_on], scores
        best_possible = self.scores[0] / self.num_generated**self.length_penalty
        can_improve = bool(best_possible > self.finished_scores[-1])
        self.is_open = self.is_open and can_improve and self.num_generated < self.max_new_tokens
        return parents[going_on], ids[going_on]

    def newest(self) -> list[int]:
        """The newest token of each running beam."""
        return [int(token) for token in self.tokens[:, self.num_generated - 1].tolist()]

    def best(self, count: int) -> list[list[int]]:
        """Tokens of the best finished continuations, best first."""
        lengths = self.finished_lengths[:count].tolist()
        return [tokens[:n] for tokens, n in zip(self.finished_tokens.tolist(), lengths, strict=False)]

    def _finish(self, candidates: Tensor, scores: Tensor, ended: Tensor) -> None:
        """Merge the candidates that end into the finished ones, keeping the best W."""
        allowed = ended.clone()
        allowed[self.num_beams :] = False
        scores = torch.where(allowed, scores / self.num_generated**self.length_penalty, _NEVER)
        lengths = torch.full_like(scores, self.num_generated, dtype=torch.int64)
        self.finished_scores, best = torch.cat((self.finished_scores, scores)).topk(self.num_beams)
        self.finished_tokens = torch.cat((self.finished_tokens, candidates))[best]
        self.finished_lengths = torch.cat((self.finished_lengths, lengths))[best]


def regrow(rows: Sequence[int], parents: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Give rows to the new beams, of which beam i continues beam parents[i].

    The first child of a beam keeps its row; the others get copies in the rows of beams without children.

    Returns:
        The rows of the new beams, and the copies to make, each as (source row, target row).
    """
    unused = [row for beam, row in enumerate(rows) if beam not in parents]
    placed: list[int] = []
    copies: list[tuple[int, int]] = []
    for parent in parents:
        row = rows[parent]
        if row in placed:
            row = unused.pop()
            copies.append((rows[parent], row))
        placed.append(row)
    return placed, copies
