"""What each row has said so far, and what follows from it for the next token. Knows no model.

Shapes: B rows, S tokens of the longest prompt, M new tokens at most, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.sampling import apply_repetition_penalty, ban_repeated_ngrams, ban_token


class History:
    """Prompt and generated tokens of each row, left-padded, in memory that is allocated once."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device) -> None:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.int64, device=device)
        self.tokens[:, :longest] = torch.tensor(padded, device=device)
        self.num_pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        self.num_prompt_tokens = longest
        self.length = longest

    def append(self, tokens: Tensor) -> None:
        """Add one generated token [B] to each row."""
        self.tokens[:, self.length] = tokens
        self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows [B'] in the given order, repeats allowed."""
        self.tokens, self.num_pads = self.tokens[rows], self.num_pads[rows]

    def adjust(self, logits: Tensor, config: GenerationConfig, eos_token_id: int | None) -> Tensor:
        """Apply the options that act under every strategy: penalty, repeated runs, shortest length.

        Args:
            logits: [B, V] of each row's next token, float32 (log-probabilities in a beam search).
            config: what to apply.
            eos_token_id: the token that a row shorter than min_new_tokens must not take.

        Returns:
            [B, V].
        """
        tokens = self.tokens[:, : self.length]
        if config.repetition_penalty != 1.0:
            logits = apply_repetition_penalty(logits, tokens, self.num_pads, config.repetition_penalty)
        if config.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, tokens, self.num_pads, config.no_repeat_ngram_size)
        if eos_token_id is not None and self.length - self.num_prompt_tokens < config.min_new_tokens:
            logits = ban_token(logits, eos_token_id)
        return logits
