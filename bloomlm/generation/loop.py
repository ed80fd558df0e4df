"""The loop from prompts to continuations, over any model that can prefill and decode a step.

Knows token ids only; a caller that wants stop texts hands in how ids become text. BLOOM in PyTorch (decode.py) and
exported programs (bloomlm.runtime) are decoded by this one loop, so options mean the same for both.

Shapes: B rows (prompts, samples or beams), V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from bloomlm.errors import GenerationError
from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.history import History
from bloomlm.generation.sampling import choose, uniform_numbers

FinishReason = Literal["eos", "length", "stop"]
OnToken = Callable[[int, int], None]
DecodeText = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation."""

    tokens: list[int]
    """The generated ids; the last is `</s>` where finish_reason is "eos"."""
    finish_reason: FinishReason
    """eos: the model ended it; stop: a stop text occurred; length: max_new_tokens were generated."""


class DecodingBatch(Protocol):
    """B rows that were read and are being continued."""

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Give every row one more token, [B] int64; returns the logits [B, V] of the token after it."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows [B'] in the given order, repeats allowed."""
        ...


class LanguageModel(Protocol):
    """What the loop needs of a model."""

    @property
    def vocab_size(self) -> int:
        """Number of ids (V)."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a continuation."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[DecodingBatch, Tensor]:
        """Read B prompts; returns them ready to decode, with room, and the logits [B, V] of each row's next token."""
        ...


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
        model: what computes the logits.
        prompts: lists of ids, at least one id each.
        config: how; by default greedily.
        on_token: called with (index in the result, id) for each token as it comes; not with a beam search, which
            settles on its tokens at the end only.
        decode_text: ids to text, needed for stop texts.
        first_sequence: number of the first result among all sequences of a run in many batches; with the seed it
            decides the random numbers.

    Returns:
        num_return_sequences continuations of the first prompt, then of the second, and so on.

    Raises:
        GenerationError: an empty prompt, an id the model does not have, or options that need what is missing.
    """
    config = config or GenerationConfig()
    _check_prompts(prompts, model.vocab_size)
    if config.stop and decode_text is None:
        raise GenerationError("stop texts need decode_text, which turns ids into text (a tokenizer's decode)")
    if on_token is not None and isinstance(config.strategy, BeamSearch):
        raise GenerationError("a beam search has no token to show before its end; choose greedy or sampling")
    if not prompts:
        return []
    ends_with_stop = _stop_test(config.stop, decode_text)
    with torch.inference_mode():
        if isinstance(config.strategy, BeamSearch):
            return _beam_search(model, prompts, config, config.strategy, ends_with_stop)
        return _decode(model, prompts, config, on_token, ends_with_stop, first_sequence)


def _decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: OnToken | None,
    ends_with_stop: Callable[[list[int]], bool],
    first_sequence: int,
) -> list[Generation]:
    """Greedy decoding and sampling."""
    repeats = config.num_return_sequences
    decoding, logits = model.prefill(prompts, config.max_new_tokens)
    history = History(prompts, config.max_new_tokens, logits.device)
    if repeats > 1:
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(repeats)
        decoding.reorder(rows)
        history.reorder(rows)
        logits = logits[rows]
    sequences: list[list[int]] = [[] for _ in range(len(prompts) * repeats)]
    reasons: list[FinishReason] = ["length"] * len(sequences)
    sampling = config.strategy if isinstance(config.strategy, Sampling) else None
    uniforms = None
    if sampling is not None:
        numbers = range(first_sequence, first_sequence + len(sequences))
        uniforms = uniform_numbers(sampling.seed, numbers, config.max_new_tokens).to(logits.device)

    batch: list[int | None] = list(range(len(sequences)))  # the sequence of each row; None once it has finished
    for step in range(config.max_new_tokens):
        scores = history.adjust(logits.float(), config, model.eos_token_id)
        tokens = choose(scores, sampling, None if uniforms is None else uniforms[:, step])
        history.append(tokens)
        for row, token in enumerate(tokens.tolist()):
            index = batch[row]
            if index is None:
                continue
            sequences[index].append(token)
            if on_token is not None:
                on_token(index, token)
            if token == model.eos_token_id:
                reasons[index], batch[row] = "eos", None
            elif ends_with_stop(sequences[index]):
                reasons[index], batch[row] = "stop", None
        kept = [row for row, index in enumerate(batch) if index is not None]
        if not kept or step + 1 == config.max_new_tokens:
            break
        if len(kept) <= len(batch) // 2:
            batch = [batch[row] for row in kept]
            rows = torch.tensor(kept, device=logits.device)
            decoding.reorder(rows)
            history.reorder(rows)
            tokens = tokens[rows]
            uniforms = None if uniforms is None else uniforms[rows]
        logits = decoding.decode_step(tokens)
    return [Generation(tokens=tokens, finish_reason=reason) for tokens, reason in zip(sequences, reasons, strict=True)]


def _beam_search(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    strategy: BeamSearch,
    ends_with_stop: Callable[[list[int]], bool],
) -> list[Generation]:
    eos_token_id = model.eos_token_id
    num_beams = strategy.num_beams
    decoding, logits = model.prefill(prompts, config.max_new_tokens)
    history = History(prompts, config.max_new_tokens, logits.device)
    state = BeamSearchState(
        len(prompts),
        num_beams,
        config.max_new_tokens,
        eos_token_id=eos_token_id,
        length_penalty=strategy.length_penalty,
        device=logits.device,
    )
    rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(num_beams)
    decoding.reorder(rows)
    history.reorder(rows)
    logits = logits[rows]

    def ends(candidates: Tensor) -> Tensor:
        found = [[ends_with_stop(tokens) for tokens in beams] for beams in candidates.tolist()]
        return torch.tensor(found, device=candidates.device)

    results: list[list[list[int]]] = [[] for _ in prompts]
    batch = list(range(len(prompts)))  # the prompt of each num_beams rows
    while batch:
        log_probs = history.adjust(logits.float().log_softmax(dim=-1), config, eos_token_id)
        rows, tokens = state.advance(log_probs, ends if config.stop else None)
        kept = [place for place, is_open in enumerate(state.is_open.tolist()) if is_open]
        if len(kept) <= len(batch) // 2:
            for place in set(range(len(batch))).difference(kept):
                results[batch[place]] = state.best(place, config.num_return_sequences)
            batch = [batch[place] for place in kept]
            places = torch.tensor(kept, dtype=torch.int64, device=logits.device)
            state.keep(places)
            rows = rows.unflatten(0, (-1, num_beams))[places].flatten()
            tokens = tokens.unflatten(0, (-1, num_beams))[places].flatten()
        if batch:
            decoding.reorder(rows)
            history.reorder(rows)
            history.append(tokens)
            logits = decoding.decode_step(tokens)

    def reason(tokens: list[int]) -> FinishReason:
        if tokens and tokens[-1] == eos_token_id:
            return "eos"
        return "stop" if ends_with_stop(tokens) else "length"

    return [Generation(tokens=tokens, finish_reason=reason(tokens)) for beams in results for tokens in beams]


def _stop_test(stop: Sequence[str], decode_text: DecodeText | None) -> Callable[[list[int]], bool]:
    """Whether tokens, the last of which is new, now contain a stop text."""
    if not stop or decode_text is None:
        return lambda tokens: False
    # A stop text that the last token completes lies within as many tokens as it has bytes, at one byte a token.
    window = max(len(text.encode()) for text in stop) + 1

    def contains(text: str) -> bool:
        return any(end in text for end in stop)

    def test(tokens: list[int]) -> bool:
        # The short text first; it may begin inside a character, so the whole text decides.
        return contains(decode_text(tokens[-window:])) and contains(decode_text(tokens))

    return test


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise GenerationError(
                f"prompt {index} has no tokens; a continuation needs at least one. To write from nothing, "
                "start with BLOOM's first token, <s>"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise GenerationError(
                f"prompt {index} contains id {bad}, but the model has ids 0 to {vocab_size - 1}; "
                "does the tokenizer belong to this model?"
            )
