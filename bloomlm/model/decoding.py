"""BLOOM as generation uses it: prompts are read into rows of a cache, then every row is continued token by token.

Shapes: B rows of a call, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache

if TYPE_CHECKING:
    from bloomlm.model.bloom import BloomForCausalLM


class BloomRows:
    """Sequences in a cache and the model that continues them, which computes in eval mode and then leaves it again."""

    def __init__(self, model: "BloomForCausalLM", num_rows: int, num_tokens: int) -> None:
        self._model = model
        self._device = model.transformer.word_embeddings.weight.device
        self.cache = KVCache(
            model.config,
            num_rows,
            num_tokens,
            dtype=model.transformer.dtype,
            device=self._device,
            n_head=len(model.transformer.heads),
            num_virtual=model.transformer.num_virtual_tokens,
        )

    def prefill(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Append B lists of ids to B different rows, in one packed forward pass -> [B, V] logits of the next tokens."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor(list(chain.from_iterable(prompts)), device=self._device)
        last = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        return self._logits(tokens, Documents.packed(lengths), rows, last)

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token [B] int64 to each of B different rows in use -> [B, V] logits of the next tokens."""
        return self._logits(tokens, Documents.equal(len(tokens), 1), rows, None)

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self.cache.copy_row(source, target)

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self.cache.free(row)

    def _logits(self, tokens: Tensor, documents: Documents, rows: Sequence[int], last: Tensor | None) -> Tensor:
        with _eval_mode(self._model):
            extension = self.cache.extend(rows, documents.lengths)
            hidden: Tensor = self._model.transformer(tokens, documents, extension, rows=last)
            return self._model.logits(hidden)


@contextmanager
def _eval_mode(model: "BloomForCausalLM") -> Iterator[None]:
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
