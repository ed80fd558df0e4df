"""BLOOM as generation uses it: prompts are read into rows of a cache, then every row is continued token by token.

Shapes: B rows of a call, L blocks, H heads, K head_dim, P virtual tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bloomlm.errors import GenerationError
from bloomlm.kernels.compiled import load_operators_for
from bloomlm.model.attention import virtual_with_columns
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache
from bloomlm.model.plain_blocks import PlainBlocks

if TYPE_CHECKING:
    from bloomlm.model.bloom import BloomForCausalLM

Virtual = Sequence[tuple[Tensor, Tensor]]
"""For each block the keys and values [H, P, K] of virtual tokens."""


class RowAdapters(Protocol):
    """Adapters with names, of which every row of a cache may use another one; None is the base model."""

    most_virtual: int
    """The most virtual tokens that an adapter of these may put before a row."""

    def virtual(self, name: str | None) -> Virtual | None:
        """The virtual tokens of an adapter, if it has any.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        ...

    def selected(
        self, names: Sequence[str | None], lengths: Sequence[int], num_kept: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Let the model use these adapters while the context is open.

        Args:
            names: the adapter of each document of the packed tokens.
            lengths: number of tokens of each document.
            num_kept: number of its last tokens that go on behind the attention of the last block.
        """
        ...


class BloomRows:
    """Sequences in a cache and the model that continues them, which computes in eval mode and then leaves it again.

    Its modules and their hooks must not change meanwhile.
    """

    def __init__(self, model: "BloomForCausalLM", num_rows: int, num_tokens: int) -> None:
        self._model = model
        self._device = model.transformer.word_embeddings.weight.device
        load_operators_for(self._device)
        self._adapters: list[str | None] = [None] * num_rows
        self._plain_blocks = PlainBlocks.of(model)
        self.cache = KVCache(
            model.config,
            num_rows,
            num_tokens,
            dtype=model.transformer.dtype,
            device=self._device,
            heads=model.transformer.heads,
            num_virtual=model.transformer.num_virtual_tokens,
            spare_virtual=0 if model.adapters is None else model.adapters.most_virtual,
        )

    def prefill(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, num_logits: Sequence[int] | None = None
    ) -> Tensor:
        """Append lists of ids to different rows, in one packed forward pass; see ModelRows."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor(list(chain.from_iterable(prompts)), device=self._device)
        kept = [1] * len(prompts) if num_logits is None else list(num_logits)
        places = [range(stop - count, stop) for stop, count in zip(accumulate(lengths), kept, strict=True)]
        chosen = torch.tensor(list(chain.from_iterable(places)), dtype=torch.int64, device=self._device)
        return self._logits(tokens, Documents.packed(lengths), rows, kept, chosen)

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token [B] int64 to each of B different rows in use -> [B, V] logits of the next tokens."""
        return self._logits(tokens.to(self._device), Documents.equal(len(tokens), 1), rows, [1] * len(tokens), None)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first num_tokens tokens of a row; see ModelRows."""
        self.cache.truncate(row, num_tokens)

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self.cache.copy_row(source, target)
        self._adapters[target] = self._adapters[source]

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self.cache.free(row)
        self._adapters[row] = None

    def set_adapter(self, row: int, name: str | None) -> None:
        """Choose the adapter of a free row; see ModelRows."""
        self.free(row)
        adapters = self._model.adapters
        if adapters is None:
            if name is not None:
                raise GenerationError(f"this model has no adapters with names, so it has no {name!r}")
            return
        virtual = adapters.virtual(name)
        self._adapters[row] = name
        if virtual is not None:
            self._write_virtual(row, virtual)

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of the keys and values of some tokens of a row; see ModelRows."""
        return self.cache.read_block(row, start, stop)

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Fill the first tokens of a row; see ModelRows."""
        prefix = self._model.transformer.prefix
        if prefix is not None and self.cache.lengths[row] == 0:
            self._write_virtual(row, prefix())
        self.cache.write_blocks(row, blocks)

    def _write_virtual(self, row: int, virtual: Virtual) -> None:
        dtype = self.cache.tensor.dtype
        blocks = [torch.stack(virtual_with_columns(key.to(dtype), value.to(dtype))) for key, value in virtual]
        self.cache.write_virtual(row, torch.stack(blocks))

    def _logits(
        self,
        tokens: Tensor,
        documents: Documents,
        rows: Sequence[int],
        num_kept: Sequence[int],
        chosen: Tensor | None,
    ) -> Tensor:
        """Logits of the chosen tokens, of which each document has num_kept; None: of all tokens."""
        adapters = self._model.adapters
        names = [self._adapters[row] for row in rows]
        selected = nullcontext() if adapters is None else adapters.selected(names, documents.lengths, num_kept)
        with eval_mode(self._model), selected:
            extension = self.cache.extend(rows, documents.lengths)
            transformer, plain_blocks = self._model.transformer, self._plain_blocks
            hidden: Tensor
            if plain_blocks is not None and plain_blocks.take(extension):
                hidden = plain_blocks.hidden_states(transformer, tokens, extension)
                hidden = hidden if chosen is None else hidden[chosen]
            else:
                hidden = transformer(tokens, documents, extension, rows=chosen)
            return self._model.logits(hidden)


@contextmanager
def eval_mode(model: "BloomForCausalLM") -> Iterator[None]:
    """Switch a model to evaluation mode during the block, without dropout and noise."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
