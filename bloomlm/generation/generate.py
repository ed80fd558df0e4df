"""Continues token ids, all in one batch, by BLOOM or an exported program. `text.py` continues texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bloomlm.errors import GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.log_probs import TokenScore
from bloomlm.generation.lookup import can_be_guessed
from bloomlm.generation.sequences import DecodeText, Event, FinishReason
from bloomlm.generation.session import DecodeSession

OnToken = Callable[[int, int], None]
"""Called with the index of a sequence and its new id."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation."""

    tokens: list[int]
    """The generated ids; the last is `</s>` where finish_reason is "eos"."""
    finish_reason: FinishReason
    """Why it ended."""
    scores: list[TokenScore]
    """The log-probability of each id and of the likeliest others, where config.num_log_probs asks; otherwise empty."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    on_token: OnToken | None = None,
    decode_text: DecodeText | None = None,
    first_sequence: int = 0,
    prompt_lookup: int = 0,
) -> list[Generation]:
    """Continue prompts, all in one batch.

    Args:
        model: what computes the logits.
        prompts: lists of ids, at least one id each.
        config: how to continue them; None: greedily.
        on_token: called with (index in the result, id) for each token as it comes; a beam search decides at its end.
        decode_text: ids to text, needed for stop texts.
        first_sequence: number of the first result within the run; with the seed it decides the random numbers.
        prompt_lookup: see DecodeSession.

    Returns:
        num_return_sequences continuations of the first prompt, then of the second, and so on.

    Raises:
        GenerationError: options without effect, or a prompt that a session refuses; see DecodeSession.open.
    """
    config = config or GenerationConfig()
    _check(config, on_token, prompt_lookup)
    if not prompts:
        return []
    session = DecodeSession(
        model,
        max_rows=len(prompts) * config.num_rows,
        max_tokens=max(map(len, prompts)) + config.max_new_tokens,
        decode_text=decode_text,
        prompt_lookup=prompt_lookup,
    )
    num_results = _open_all(session, prompts, config, first_sequence)
    events: list[list[Event]] = [[] for _ in range(num_results)]  # a new session's handles count from 0
    while not session.is_empty:
        for event in session.step():
            events[event.handle].append(event)
            if on_token is not None:
                on_token(event.handle, event.token)
    return [_generation(own) for own in events]


def _generation(events: Sequence[Event]) -> Generation:
    scores = [TokenScore(event.log_prob, event.top_log_probs or ()) for event in events if event.log_prob is not None]
    reason = events[-1].finish_reason
    assert reason is not None, "a sequence leaves a session with its last event"
    return Generation(tokens=[event.token for event in events], finish_reason=reason, scores=scores)


def _check(config: GenerationConfig, on_token: OnToken | None, prompt_lookup: int) -> None:
    if on_token is not None and isinstance(config.strategy, BeamSearch):
        raise GenerationError("a beam search has no token to show before its end; choose greedy or sampling")
    if prompt_lookup < 0:
        raise GenerationError(f"prompt_lookup is {prompt_lookup}; it must be an integer from 1, or 0 for no guesses")
    if prompt_lookup and not can_be_guessed(config):
        raise GenerationError(
            "prompt_lookup has no effect with sampling, a beam search or penalties; leave it out, or decode greedily "
            "without repetition_penalty, no_repeat_ngram_size, frequency_penalty and presence_penalty"
        )


def _open_all(
    session: DecodeSession, prompts: Sequence[Sequence[int]], config: GenerationConfig, first_sequence: int
) -> int:
    """Open prompts; returns the number of their results."""
    num_results = 0
    for index, prompt in enumerate(prompts):
        try:
            num_results += len(session.open(prompt, config, first_sequence=first_sequence + num_results))
        except GenerationError as error:
            raise GenerationError(f"prompt {index}: {error}") from None
    return num_results
