"""Prompts, which are read into the rows of a model in chunks of any size, and the scores of their tokens.

Shapes: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bloomlm.errors import GenerationError
from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.language_model import ModelRows
from bloomlm.generation.log_probs import PromptScores, log_probs_of
from bloomlm.generation.lookup import PromptLookup, can_be_guessed
from bloomlm.generation.sampling import uniform_numbers
from bloomlm.generation.sequences import DecodeText, LogitOptions, Sample, Search, stop_test
from bloomlm.row_memory import RowFeatures

MOST_SCORED = 128
"""Scored positions of one forward pass, which bounds the memory of their logits."""


@dataclass(eq=False, kw_only=True)
class Prompt:
    """A prompt whose tokens are being read."""

    tokens: Sequence[int]
    """Its ids."""
    handles: range
    """Handles of its results."""
    config: GenerationConfig
    """How it is continued."""
    first_sequence: int
    """Number of its first result within the caller's run."""
    num_top: int | None
    """Number of likeliest ids to name at each of its positions; None: its tokens are not scored."""
    num_read: int
    """Tokens that the model has read."""
    rows: list[int] = field(default_factory=list)
    """Rows that it needs when it is continued; it is read into the first of them."""
    scores: PromptScores = field(default_factory=lambda: [None])
    """Scores of its tokens so far, one more than were read."""

    @property
    def num_unread(self) -> int:
        """Tokens that the model has not read."""
        return len(self.tokens) - self.num_read

    def advance(self, count: int, logits: Tensor) -> None:
        """Count more tokens as read, and score the tokens after each of them by logits [count, V] where asked."""
        start = self.num_read + 1
        self.num_read += count
        if self.num_top is not None and (coming := self.tokens[start : start + count]):
            self.scores += log_probs_of(logits[: len(coming)], coming, self.num_top)

    def start(
        self, eos_token_id: int | None, decode_text: DecodeText | None, device: torch.device, *, looks_up: bool
    ) -> list[Sample] | list[Search]:
        """Its sequences, once it is read; looks_up: whether their tokens are guessed where they can be."""
        config, group = self.config, LogitOptions(self.config)
        stops = stop_test(config.stop, decode_text, config.min_new_tokens)
        if isinstance(config.strategy, BeamSearch):
            state = BeamSearchState(
                config.strategy.num_beams,
                config.max_new_tokens,
                eos_token_id=None if config.ignore_eos else eos_token_id,
                length_penalty=config.strategy.length_penalty,
                device=device,
            )
            return [Search(self.handles, self.rows, config, group, stops, state)]
        uniforms: list[list[float]] = [[] for _ in self.rows]
        if isinstance(config.strategy, Sampling):
            numbers = range(self.first_sequence, self.first_sequence + len(self.rows))
            uniforms = uniform_numbers(config.strategy.seed, numbers, config.max_new_tokens).tolist()
        with_lookup = looks_up and can_be_guessed(config)
        return [
            Sample([handle], [row], config, group, stops, own, PromptLookup(self.tokens) if with_lookup else None)
            for handle, row, own in zip(self.handles, self.rows, uniforms, strict=True)
        ]


def check_prompt(prompt: Prompt, vocab_size: int, max_tokens: int, *, can_decode: bool) -> None:
    """Raise GenerationError for a prompt that cannot be continued.

    Args:
        prompt: the prompt with its options.
        vocab_size: number of the model's ids.
        max_tokens: most tokens of a sequence, prompt and max_new_tokens together.
        can_decode: whether there is a function from ids to text.
    """
    tokens, config = prompt.tokens, prompt.config
    if not tokens:
        raise GenerationError(
            "the prompt has no tokens; a continuation needs at least one. To write from nothing, "
            "start with BLOOM's first token, <s>"
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        bad = min(tokens) if min(tokens) < 0 else max(tokens)
        raise GenerationError(
            f"the prompt contains id {bad}, but the model has ids 0 to {vocab_size - 1}; "
            "does the tokenizer belong to this model?"
        )
    for name, ids in (("stop_token_ids", config.stop_token_ids), ("logit_bias", [id_ for id_, _ in config.logit_bias])):
        if wrong := [token for token in ids if not 0 <= token < vocab_size]:
            raise GenerationError(f"{name} contains id {wrong[0]}, but the model has ids 0 to {vocab_size - 1}")
    if len(tokens) + config.max_new_tokens > max_tokens:
        raise GenerationError(
            f"the prompt has {len(tokens)} tokens and may get {config.max_new_tokens} new ones; "
            f"this session has room for {max_tokens} tokens of a sequence"
        )
    if config.stop and not can_decode:
        raise GenerationError("stop texts need decode_text, which turns ids into text (a tokenizer's decode)")
    most = len(tokens) - 1 if prompt.num_top is None else 0
    if prompt.num_read > most:
        raise GenerationError(
            f"blocks hold {prompt.num_read} tokens; at most {most} tokens of this prompt need not be read"
        )


def read_chunks(rows: ModelRows, reads: Mapping[Prompt, int], features: RowFeatures) -> dict[Prompt, Tensor]:
    """Read the next tokens of prompts, in one forward pass unless many are scored.

    Args:
        rows: the rows of the prompts.
        reads: how many tokens of each prompt to read; more than it has are all that it has.
        features: what the rows can do; without scores_chunks, prompts that are scored are read token by token.

    Returns:
        Logits [V] of the first new token of each prompt that is now read whole.
    """
    left = {prompt: min(count, prompt.num_unread) for prompt, count in reads.items()}
    complete: dict[Prompt, Tensor] = {}
    while any(left.values()):
        room = MOST_SCORED if features.scores_chunks else 1
        chunks: dict[Prompt, int] = {}
        for prompt, count in left.items():
            size = count if prompt.num_top is None else min(count, room)
            room -= 0 if prompt.num_top is None else size
            if size:
                chunks[prompt] = size
                left[prompt] -= size
        tokens = [prompt.tokens[prompt.num_read : prompt.num_read + size] for prompt, size in chunks.items()]
        num_logits = [
            int(size == prompt.num_unread) if prompt.num_top is None else size for prompt, size in chunks.items()
        ]
        logits = rows.prefill([prompt.rows[0] for prompt in chunks], tokens, num_logits=num_logits)
        for (prompt, size), own_logits in zip(chunks.items(), logits.split(num_logits), strict=True):
            prompt.advance(size, own_logits)
            if not prompt.num_unread:
                complete[prompt] = own_logits[-1]
    return complete
