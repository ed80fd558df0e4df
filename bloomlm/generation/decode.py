"""From prompts to continuations: prefill, decode_step, and the loop over them.

Knows token ids only; a caller that wants stop texts hands in how ids become text. A prompt's continuation does not
depend on the batch it is in: prompts are padded on the left, and pads are masked.

Shapes: B rows (prompts, samples or beams), S tokens of the longest prompt, M new tokens at most, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bloomlm.adapters.apply import adapter_config
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import GenerationError
from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.history import History
from bloomlm.generation.sampling import choose, uniform_numbers
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache

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


def prefill(model: BloomForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[KVCache, Tensor]:
    """Read the prompts, without computing on pads and with the head on each prompt's last token only.

    Args:
        model: in eval mode.
        prompts: B lists of at least one id.
        max_new_tokens: tokens that the cache has room for after them.

    Returns:
        The filled cache of B rows, and the logits [B, V] of each row's next token.
    """
    weight = model.transformer.word_embeddings.weight
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    adapter = adapter_config(model)
    num_virtual = adapter.num_prefix_tokens if isinstance(adapter, PrefixConfig) else 0
    cache = KVCache(
        model.config,
        len(prompts),
        num_virtual + longest + max_new_tokens,
        dtype=weight.dtype,
        device=weight.device,
    )
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)
    hidden = model.transformer(tokens, _left_padded(lengths, weight.device), cache)
    last = torch.tensor(lengths, device=weight.device).cumsum(0) - 1
    return cache, model.logits(hidden[last])


def decode_step(model: BloomForCausalLM, cache: KVCache, tokens: Tensor) -> Tensor:
    """Give every row one more token.

    Args:
        model: in eval mode.
        cache: of B rows, filled by prefill; grows by one token.
        tokens: [B] int64.

    Returns:
        [B, V] logits of the token after it.
    """
    hidden: Tensor = model.transformer(tokens, Documents.equal(len(tokens), 1), cache)
    return model.logits(hidden)


def generate(
    model: BloomForCausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    on_token: OnToken | None = None,
    decode_text: DecodeText | None = None,
    first_sequence: int = 0,
) -> list[Generation]:
    """Continue prompts, all in one batch.

    Args:
        model: run in eval mode, and put back into its mode afterwards.
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
    _check_prompts(prompts, model.config.vocab_size)
    if config.stop and decode_text is None:
        raise GenerationError("stop texts need decode_text, which turns ids into text (a tokenizer's decode)")
    if on_token is not None and isinstance(config.strategy, BeamSearch):
        raise GenerationError("a beam search has no token to show before its end; choose greedy or sampling")
    if not prompts:
        return []
    ends_with_stop = _stop_test(config.stop, decode_text)
    with torch.inference_mode(), _eval_mode(model):
        if isinstance(config.strategy, BeamSearch):
            return _beam_search(model, prompts, config, config.strategy, ends_with_stop)
        return _decode(model, prompts, config, on_token, ends_with_stop, first_sequence)


def _decode(
    model: BloomForCausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: OnToken | None,
    ends_with_stop: Callable[[list[int]], bool],
    first_sequence: int,
) -> list[Generation]:
    """Greedy decoding and sampling."""
    repeats = config.num_return_sequences
    cache, logits = prefill(model, prompts, config.max_new_tokens)
    history = History(prompts, config.max_new_tokens, logits.device)
    if repeats > 1:
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(repeats)
        cache.reorder(rows)
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
        scores = history.adjust(logits.float(), config, model.config.eos_token_id)
        tokens = choose(scores, sampling, None if uniforms is None else uniforms[:, step])
        history.append(tokens)
        for row, token in enumerate(tokens.tolist()):
            index = batch[row]
            if index is None:
                continue
            sequences[index].append(token)
            if on_token is not None:
                on_token(index, token)
            if token == model.config.eos_token_id:
                reasons[index], batch[row] = "eos", None
            elif ends_with_stop(sequences[index]):
                reasons[index], batch[row] = "stop", None
        kept = [row for row, index in enumerate(batch) if index is not None]
        if not kept or step + 1 == config.max_new_tokens:
            break
        if len(kept) <= len(batch) // 2:
            batch = [batch[row] for row in kept]
            rows = torch.tensor(kept, device=logits.device)
            cache.reorder(rows)
            history.reorder(rows)
            tokens = tokens[rows]
            uniforms = None if uniforms is None else uniforms[rows]
        logits = decode_step(model, cache, tokens)
    return [Generation(tokens=tokens, finish_reason=reason) for tokens, reason in zip(sequences, reasons, strict=True)]


def _beam_search(
    model: BloomForCausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    strategy: BeamSearch,
    ends_with_stop: Callable[[list[int]], bool],
) -> list[Generation]:
    eos_token_id = model.config.eos_token_id
    num_beams = strategy.num_beams
    cache, logits = prefill(model, prompts, config.max_new_tokens)
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
    cache.reorder(rows)
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
            cache.reorder(rows)
            history.reorder(rows)
            history.append(tokens)
            logits = decode_step(model, cache, tokens)

    def reason(tokens: list[int]) -> FinishReason:
        if tokens and tokens[-1] == eos_token_id:
            return "eos"
        return "stop" if ends_with_stop(tokens) else "length"

    return [Generation(tokens=tokens, finish_reason=reason(tokens)) for beams in results for tokens in beams]


def _left_padded(lengths: Sequence[int], device: torch.device) -> Documents:
    longest = max(lengths)
    if min(lengths) == longest:
        return Documents.equal(len(lengths), longest)
    places = [torch.arange((row + 1) * longest - n, (row + 1) * longest) for row, n in enumerate(lengths)]
    return Documents(tuple(lengths), (len(lengths), longest), torch.cat(places).to(device))


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


@contextmanager
def _eval_mode(model: BloomForCausalLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
