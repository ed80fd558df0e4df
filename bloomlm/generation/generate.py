"""generate continues token ids, complete continues texts batch by batch. Both serve BLOOM and exported programs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bloomlm.errors import GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText, FinishReason
from bloomlm.generation.session import DecodeSession

OnToken = Callable[[int, int], None]
"""Called with the index of a sequence and its new id."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation."""

    tokens: list[int]
    """The generated ids; the last is `</s>` where finish_reason is "eos"."""
    finish_reason: FinishReason
    """Why it ended."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    on_token: OnToken | None = None,
    decode_text: DecodeText | None = None,
    first_sequence: int = 0,
) -> list[Generation]:
    """Continue prompts, all in one batch.

    Args:
        model: computes the logits: a BloomForCausalLM, or the model of an exported program.
        prompts: lists of ids, at least one id each.
        config: how to continue them; None: greedily.
        on_token: called with (index in the result, id) for each token as it comes; impossible with a beam search, which
            decides on its tokens at the end.
        decode_text: ids to text, needed for stop texts.
        first_sequence: number of the first result within a run of many batches; with the seed it decides the random
            numbers.

    Returns:
        num_return_sequences continuations of the first prompt, then of the second, and so on.

    Raises:
        GenerationError: an empty prompt, an id outside the vocabulary, on_token with a beam search, or stop texts
            without decode_text.
    """
    config = config or GenerationConfig()
    if on_token is not None and isinstance(config.strategy, BeamSearch):
        raise GenerationError("a beam search has no token to show before its end; choose greedy or sampling")
    if not prompts:
        return []
    session = DecodeSession(
        model,
        max_rows=len(prompts) * config.num_rows,
        max_tokens=max(map(len, prompts)) + config.max_new_tokens,
        decode_text=decode_text,
    )
    handles = session.admit(prompts, [config] * len(prompts), first_sequence=first_sequence)
    tokens: list[list[int]] = [[] for _ in handles]
    reasons: list[FinishReason] = ["length"] * len(handles)
    while not session.is_empty:
        for event in session.step():  # a new session's handles count from 0
            tokens[event.handle].append(event.token)
            reasons[event.handle] = event.finish_reason or reasons[event.handle]
            if on_token is not None:
                on_token(event.handle, event.token)
    return [Generation(tokens=ids, finish_reason=reason) for ids, reason in zip(tokens, reasons, strict=True)]


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
    """The part of a tokenizer that complete needs."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        ...


class GenerateTokens(Protocol):
    """The function `generate` with its model given."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        on_token: OnToken | None,
        decode_text: DecodeText,
        first_sequence: int,
    ) -> list[Generation]:
        """Continue prompts, all in one batch."""
        ...


def complete(
    generate_tokens: GenerateTokens,
    tokenizer: TextCodec,
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    batch_size: int,
    src_length: int | None = None,
    num_done: int = 0,
    on_token: OnToken | None = None,
) -> Iterator[Completion]:
    """Complete prompts batch by batch; completions are yielded when their batch is done.

    Args:
        generate_tokens: continues ids, all in one batch.
        tokenizer: converts texts to ids and back.
        prompts: all prompts of the run.
        config: how to continue them.
        batch_size: number of prompts that are computed at once.
        src_length: the most tokens of a prompt; the end of a longer one is dropped. None: no cut.
        num_done: number of prompts to skip at the beginning; the samples of the others do not change.
        on_token: called with (index among all completions of the run, id) for each token as it comes.

    Raises:
        GenerationError: an empty prompt, or a batch or length below 1.
    """
    if batch_size < 1:
        raise GenerationError(f"batch_size is {batch_size}; it must be an integer from 1")
    encoded = _encode(tokenizer, prompts, src_length)
    for start in range(num_done, len(prompts), batch_size):
        first = start * config.num_return_sequences
        results = generate_tokens(
            encoded[start : start + batch_size],
            config,
            on_token=_shifted(on_token, first),
            decode_text=tokenizer.decode,
            first_sequence=first,
        )
        for place, result in enumerate(results):
            prompt = prompts[start + place // config.num_return_sequences]
            yield _completion(tokenizer, prompt, result, config.stop)


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


def _completion(tokenizer: TextCodec, prompt: str, result: Generation, stop: Sequence[str]) -> Completion:
    text = tokenizer.decode(result.tokens)
    if result.finish_reason == "stop":
        text = text[: min(text.index(end) for end in stop if end in text)]
    return Completion(prompt=prompt, completion=text, finish_reason=result.finish_reason, tokens=result.tokens)


def _shifted(on_token: OnToken | None, first: int) -> OnToken | None:
    return None if on_token is None else lambda index, token: on_token(first + index, token)
