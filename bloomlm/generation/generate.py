"""generate: admit all prompts into a session, and step until it is empty. For BLOOM and exported programs alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bloomlm.errors import GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText, FinishReason
from bloomlm.generation.session import DecodeSession

OnToken = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation."""

    tokens: list[int]
    """The generated ids; the last is `</s>` where finish_reason is "eos"."""
    finish_reason: FinishReason
    """eos: the model ended it; stop: a stop text occurred; length: max_new_tokens were generated."""


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
        model: what computes the logits: a BloomForCausalLM, or an exported program's model.
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
