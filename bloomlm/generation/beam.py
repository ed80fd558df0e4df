"""The bookkeeping of beam search: scores and tokens, no model.

The search is transformers' (early_stopping False): of each step's 2 * W likeliest continuations, those among the
first W that end are kept as finished, the best W that do not end go on; a prompt's search closes once its best
unfinished beam, at its present length, cannot beat its worst finished one.

Shapes: B prompts, W beams of each, V vocabulary, M new tokens at most.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_NEVER = -1.0e9  # a log-probability that no real continuation is below


class BeamSearchState:
    """The running and the finished continuations of B prompts."""

    def __init__(
        self,
        num_prompts: int,
        num_beams: int,
        max_new_tokens: int,
        *,
        eos_token_id: int | None,
        length_penalty: float,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_prompts, num_beams)
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens
        self.eos_token_id = eos_token_id
        self.length_penalty = length_penalty
        self.num_generated = 0
        self.tokens = torch.zeros(*shape, max_new_tokens, dtype=torch.int64, device=device)
        """[B, W, M] tokens of the running beams, num_generated of them filled."""
        self.scores = torch.full(shape, _NEVER, device=device)
        """[B, W] their log-probabilities. At first all beams are the same, so only one of them counts."""
        self.scores[:, 0] = 0.0
        self.finished_tokens = torch.zeros_like(self.tokens)
        self.finished_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.finished_scores = torch.full(shape, _NEVER, device=device)
        """[B, W] log-probability / length ** length_penalty, best first."""
        self.is_open = torch.ones(num_prompts, dtype=torch.bool, device=device)
        """[B] whether a running beam may still become one of the W finished ones."""

    def advance(self, log_probs: Tensor, ends: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            log_probs: [B * W, V] of the next token of each running beam.
            ends: tells which candidates, given as their tokens [B, 2 * W, T], end for a reason of the caller's
                (a stop text): [B, 2 * W] bool.

        Returns:
            The rows [B * W] of log_probs that the new running beams grew from, and their new tokens [B * W].
        """
        num_candidates = 2 * self.num_beams
        vocab_size = log_probs.shape[-1]
        totals = log_probs.unflatten(0, self.scores.shape) + self.scores[:, :, None]
        scores, flat = totals.flatten(1).topk(num_candidates, dim=1)
        parents, ids = flat // vocab_size, flat % vocab_size
        candidates = _pick(self.tokens, parents)
        candidates[:, :, self.num_generated] = ids
        self.num_generated += 1

        ended = torch.zeros_like(ids, dtype=torch.bool)
        if self.eos_token_id is not None:
            ended |= ids == self.eos_token_id
        if ends is not None:
            ended |= ends(candidates[:, :, : self.num_generated])
        if self.num_generated == self.max_new_tokens:
            ended = torch.ones_like(ended)
        self._finish(candidates, scores, ended)

        scores, going_on = torch.where(ended, scores + _NEVER, scores).topk(self.num_beams, dim=1)
        self.tokens, self.scores = _pick(candidates, going_on), scores
        self._close()
        first_rows = torch.arange(0, log_probs.shape[0], self.num_beams, device=flat.device)
        rows = parents.gather(1, going_on) + first_rows[:, None]
        return rows.flatten(), ids.gather(1, going_on).flatten()

    def keep(self, prompts: Tensor) -> None:
        """Go on with these prompts only: [B'] indices."""
        for name in ("tokens", "scores", "finished_tokens", "finished_lengths", "finished_scores", "is_open"):
            setattr(self, name, getattr(self, name)[prompts])

    def best(self, prompt: int, count: int) -> list[list[int]]:
        """Tokens of a prompt's best finished continuations, best first."""
        lengths = self.finished_lengths[prompt, :count].tolist()
        return [tokens[:n] for tokens, n in zip(self.finished_tokens[prompt].tolist(), lengths, strict=False)]

    def _finish(self, candidates: Tensor, scores: Tensor, ended: Tensor) -> None:
        """Merge the candidates that end into the finished ones, keeping the best W."""
        allowed = ended & self.is_open[:, None]
        allowed[:, self.num_beams :] = False
        scores = torch.where(allowed, scores / self.num_generated**self.length_penalty, _NEVER)
        lengths = torch.full_like(scores, self.num_generated, dtype=torch.int64)
        merged = torch.cat((self.finished_scores, scores), dim=1)
        self.finished_scores, best = merged.topk(self.num_beams, dim=1)
        self.finished_tokens = _pick(torch.cat((self.finished_tokens, candidates), dim=1), best)
        self.finished_lengths = torch.cat((self.finished_lengths, lengths), dim=1).gather(1, best)

    def _close(self) -> None:
        best_possible = self.scores[:, 0] / self.num_generated**self.length_penalty
        self.is_open &= best_possible > self.finished_scores[:, -1]
        if self.num_generated == self.max_new_tokens:
            self.is_open = torch.zeros_like(self.is_open)


def _pick(beams: Tensor, indices: Tensor) -> Tensor:
    """[B, X, M] and [B, Y] -> [B, Y, M]."""
    return beams.gather(1, indices[:, :, None].expand(-1, -1, beams.shape[2]))
