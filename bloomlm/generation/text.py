"""Completes texts batch by batch. A loaded model and an exported program do it alike."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bloomlm.errors import GenerationError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Generation, OnToken
from bloomlm.generation.sequences import FinishReason, find_stop

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of one prompt."""

    prompt: str
    """The whole prompt, before any cut."""
    completion: str
    """The generated text, without special tokens, cut before a stop text."""
    finish_reason: FinishReason
    """Why it ended."""
    tokens: list[int]
    """The generated ids, including a final `</s>` or the tokens of the stop text."""


class TextCodec(Protocol):
    """The part of a tokenizer that completing texts needs."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        ...


class TextGenerator(ABC):
    """What completes prompts: something that continues ids, and its tokenizer."""

    tokenizer: TextCodec

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 8,
        src_length: int | None = None,
        prompt_lookup: int = 0,
        **options: Any,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: one text or several.
            batch_size: prompts computed at once; it changes the speed, not the results.
            src_length: maximum tokens of a prompt; a longer one loses its end, as in training. None: no limit.
            prompt_lookup: most tokens to guess for a greedy completion from its own text and to check in one pass; it
                changes the speed, not the results. See generation.lookup.
            options: decode_strategy ("greedy", "sampling" or "beam_search"); max_new_tokens, min_new_tokens,
                repetition_penalty, no_repeat_ngram_size, stop (texts), num_return_sequences; temperature, top_k,
                top_p, min_p and seed of sampling; num_beams and length_penalty of beam search. See
                bloomlm.GenerationConfig.

        Returns:
            num_return_sequences completions of the first prompt, then of the second, and so on.

        Raises:
            GenerationError: an empty prompt, an unknown option, or one without effect.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = GenerationConfig.from_options(**{**self._default_options(), **options})
        return list(
            self.completions(texts, config, batch_size=batch_size, src_length=src_length, prompt_lookup=prompt_lookup)
        )

    def completions(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        *,
        batch_size: int = 8,
        src_length: int | None = None,
        prompt_lookup: int = 0,
        num_done: int = 0,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Complete prompts batch by batch; the completions of a batch come when it is done.

        Args:
            prompts: all prompts of the run.
            config: how to complete them.
            batch_size: prompts computed at once on each copy of the model.
            src_length, prompt_lookup: see generate.
            num_done: number of prompts to skip at the beginning; the samples of the others do not change.
            on_token: called with (number of the completion in the run, token id) as soon as a token is generated.

        Raises:
            GenerationError: an empty prompt, a batch or length below 1, or log-probabilities, which are not reported.
        """
        if batch_size < 1:
            raise GenerationError(f"batch_size is {batch_size}; it must be an integer from 1")
        if config.num_log_probs is not None:
            raise GenerationError(
                "completions of texts report no log-probabilities; leave out num_log_probs, or use "
                "bloomlm.generation.generate"
            )
        size = batch_size * self._num_copies()
        encoded = _encode(self.tokenizer, prompts, src_length)
        for start in range(num_done, len(prompts), size):
            first = start * config.num_return_sequences
            results = self._continue(
                encoded[start : start + size],
                config,
                on_token=_shifted(on_token, first),
                first_sequence=first,
                prompt_lookup=prompt_lookup,
            )
            for place, result in enumerate(results):
                prompt = prompts[start + place // config.num_return_sequences]
                yield _completion(self.tokenizer, prompt, result, config)

    def _default_options(self) -> dict[str, Any]:
        """Options of `generate` where they are not given."""
        return {}

    def _num_copies(self) -> int:
        """Copies of the model, each of which computes batch_size prompts."""
        return 1

    @abstractmethod
    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        on_token: OnToken | None,
        first_sequence: int,
        prompt_lookup: int,
    ) -> list[Generation]:
        """Continue ids, all in one batch; see generation.generate."""


def _encode(tokenizer: TextCodec, prompts: Sequence[str], src_length: int | None) -> list[list[int]]:
    if src_length is not None and src_length < 1:
        raise GenerationError(f"src_length is {src_length}; it must be an integer from 1")
    encoded = tokenizer.encode_batch(prompts)
    for number, tokens in enumerate(encoded, start=1):
        if not tokens:
            raise GenerationError(
                f"prompt {number} of {len(prompts)} is empty; a continuation needs at least one token. "
                "To write from nothing, give '<s>', BLOOM's first token"
            )
    longest = max(map(len, encoded), default=0)
    if src_length is None or longest <= src_length:
        return encoded
    num_cut = sum(len(tokens) > src_length for tokens in encoded)
    _LOG.warning(
        "%d of %d prompts are longer than src_length %d tokens (the longest has %d); their ends were dropped, as "
        "in training. A larger src_length keeps them whole",
        num_cut,
        len(encoded),
        src_length,
        longest,
    )
    return [tokens[:src_length] for tokens in encoded]


def _completion(tokenizer: TextCodec, prompt: str, result: Generation, config: GenerationConfig) -> Completion:
    text = tokenizer.decode(result.tokens)
    if result.finish_reason == "stop":
        text = text[: find_stop(text, config.stop, len(tokenizer.decode(result.tokens[: config.min_new_tokens])))]
    return Completion(prompt=prompt, completion=text, finish_reason=result.finish_reason, tokens=result.tokens)


def _shifted(on_token: OnToken | None, first: int) -> OnToken | None:
    return None if on_token is None else lambda index, token: on_token(first + index, token)
