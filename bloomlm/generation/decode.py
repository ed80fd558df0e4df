"""BLOOM's side of generation: prefill, decode_step, and generate, which hands them to the loop.

Knows token ids only. A prompt's continuation does not depend on the batch it is in: prompts are padded on the left, and
pads are masked.

Shapes: B rows (prompts, samples or beams), S tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bloomlm.generation import loop
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.loop import DecodeText, FinishReason, Generation, OnToken
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache

__all__ = ["DecodeText", "FinishReason", "Generation", "OnToken", "decode_step", "generate", "prefill"]


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
    cache = KVCache(
        model.config,
        len(prompts),
        model.transformer.num_virtual_tokens + longest + max_new_tokens,
        dtype=model.transformer.dtype,
        device=weight.device,
        n_head=len(model.transformer.heads),
    )
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)
    last = torch.tensor(lengths, device=weight.device).cumsum(0) - 1
    return cache, model.logits(model.transformer(tokens, _left_padded(lengths, weight.device), cache, rows=last))


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
    """Continue prompts, all in one batch; see loop.generate.

    Args:
        model: run in eval mode, and put back into its mode afterwards.
        prompts, config, on_token, decode_text, first_sequence: as loop.generate's.

    Raises:
        GenerationError: an empty prompt, an id the model does not have, or options that need what is missing.
    """
    with _eval_mode(model):
        return loop.generate(
            BloomLanguageModel(model),
            prompts,
            config,
            on_token=on_token,
            decode_text=decode_text,
            first_sequence=first_sequence,
        )


class BloomLanguageModel:
    """A BLOOM in eval mode as the loop wants it."""

    def __init__(self, model: BloomForCausalLM) -> None:
        self._model = model
        self.vocab_size = model.config.vocab_size
        self.eos_token_id = model.config.eos_token_id

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple["BloomBatch", Tensor]:
        """Read the prompts."""
        cache, logits = prefill(self._model, prompts, max_new_tokens)
        return BloomBatch(self._model, cache), logits


class BloomBatch:
    """Rows in a KVCache, and the model that continues them."""

    def __init__(self, model: BloomForCausalLM, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Give every row one more token."""
        return decode_step(self._model, self._cache, tokens)

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows."""
        self._cache.reorder(rows)


def _left_padded(lengths: Sequence[int], device: torch.device) -> Documents:
    longest = max(lengths)
    if min(lengths) == longest:
        return Documents.equal(len(lengths), longest)
    places = [torch.arange((row + 1) * longest - n, (row + 1) * longest) for row, n in enumerate(lengths)]
    return Documents(tuple(lengths), (len(lengths), longest), torch.cat(places).to(device))


@contextmanager
def _eval_mode(model: BloomForCausalLM) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
