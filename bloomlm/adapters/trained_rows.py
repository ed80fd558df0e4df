"""A frozen word embedding in which the rows of some tokens learn, as with PEFT's trainable_token_indices.

The rows that learn are a separate parameter [N, D], so that no gradient [V, D] exists. They replace rows of the weight
both in the embedding and in the head, so their gradient is the sum of both uses. Tensor-parallel ranks divide the
vocabulary, and each holds all trained rows.

Shapes: M tokens, N tokens whose rows learn, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.adapters.base import AdapterModule
from bloomlm.errors import AdapterError
from bloomlm.model.embedding import ReplacedRows, WordEmbedding
from bloomlm.model.quantized import dequantize_rows
from bloomlm.model.shard import fill, is_shard

if TYPE_CHECKING:
    from bloomlm.adapters.lora import LoraConfig

TRAINED_ROWS = "trained_rows"
PEFT_ROWS = "token_adapter.trainable_tokens_delta"
"""PEFT's name of the trained rows, within the embedding."""


class TrainedRowsEmbedding(WordEmbedding, AdapterModule):
    """A WordEmbedding whose weight keeps its name, with trained_rows [N, D] beside it."""

    config: "LoraConfig"
    trained_rows: nn.Parameter
    trained_tokens: Tensor
    """[N] int64 ids of the tokens of trained_rows, in the order of the configuration."""

    @classmethod
    def from_embedding(
        cls, embedding: WordEmbedding, config: "LoraConfig", dtype: torch.dtype, device: torch.device | None = None
    ) -> "TrainedRowsEmbedding":
        """Wrap an embedding, sharing its weight. If that is loaded and whole, the trained rows are copied from it.

        Args:
            embedding: the embedding; its weight stops learning.
            config: names the tokens.
            dtype: precision of the trained rows.
            device: where they go; None: where the weight is.
        """
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim)
        layer.config, layer.weight, layer.weight_scale = config, embedding.weight, embedding.weight_scale
        layer.partition = embedding.partition
        layer.weight.requires_grad_(False)
        device = device or embedding.weight.device
        tokens = torch.tensor(config.trained_tokens, dtype=torch.int64, device=device)
        layer.register_buffer("trained_tokens", tokens, persistent=False)
        layer.trained_rows = nn.Parameter(torch.zeros(len(tokens), embedding.embedding_dim, dtype=dtype, device=device))
        if not layer.weight.is_meta and len(layer.weight) == embedding.num_embeddings:
            layer.start_from_weight()
        return layer.train(embedding.training)

    @torch.no_grad()
    def start_from_weight(self) -> None:
        """Copy the trained rows from the weight. If ranks divide the weight, all of them must call this."""
        weight = self.weight.full_tensor() if is_shard(self.weight) else self.weight
        if self.weight_scale is None:
            rows = self.partition.look_up(self.trained_tokens, lambda places: F.embedding(places, weight))
        else:
            scale = self.weight_scale[self.trained_tokens]
            rows = dequantize_rows(weight[self.trained_tokens], scale, torch.float32)
        fill(self.trained_rows, rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """[M] ids -> [M, D]."""
        return self.put_rows(tokens, super().forward(tokens))

    def put_rows(self, tokens: Tensor, base: Tensor) -> Tensor:
        """The base embedding's rows [M, D] of ids [M], with the trained rows in their places."""
        ordered, order = self.trained_tokens.sort()
        position = torch.searchsorted(ordered, tokens).clamp_(max=len(ordered) - 1)
        learns = ordered[position] == tokens
        rows = F.embedding(order[position], self.trained_rows).to(base.dtype)
        return torch.where(learns.unsqueeze(-1), rows, base)

    def replaced_rows(self) -> ReplacedRows:
        """The trained rows of tokens in this rank's part of the vocabulary."""
        places = self.trained_tokens - self.partition.first_token
        is_here = (places >= 0) & (places < len(self.weight))
        # the logits of a rank give the gradient of its rows, and the gradients of all ranks are added up
        return ReplacedRows(places[is_here], self.partition.enter(self.trained_rows)[is_here])

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., V] logits."""
        z = super().logits(hidden)
        self.put_logits(hidden, z)
        return z

    def put_logits(self, hidden: Tensor, z: Tensor) -> None:
        """Overwrite the logits z [..., V] of hidden states [..., D] at the tokens of the trained rows."""
        ReplacedRows(self.trained_tokens, self.trained_rows).put_logits(hidden, z)

    def merged_weight(self, whole: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        """[V, D] the weight of this rank with the trained rows in their places.

        Args:
            whole: gathers the shards of a tensor.
            dtype: precision of the result.
        """
        merged = whole(self.weight).to(dtype, copy=True)
        rows, places = whole(self.trained_rows), self.trained_tokens - self.partition.first_token
        is_here = (places >= 0) & (places < len(merged))
        merged[places[is_here]] = rows[is_here].to(dtype)
        return merged


def tokens_in_peft(indices: object, vocab_size: int) -> tuple[int, ...]:
    """The tokens in PEFT's trainable_token_indices, which is a list, or a list for each of some layers.

    Raises:
        AdapterError: it is neither, names tokens that do not exist, or differs between head and embedding.
    """
    if isinstance(indices, dict):
        ends = {str(name).rpartition(".")[2] for name in indices}
        lists = list(indices.values())
        if "word_embeddings" not in ends or not ends <= {"word_embeddings", "lm_head"} or lists[1:] != lists[:-1]:
            raise AdapterError(
                f"trainable_token_indices names {', '.join(map(str, indices))}; bloomlm trains rows of "
                "word_embeddings, and the same ones of lm_head, which is tied to it"
            )
        indices = lists[0]
    if indices is None:
        return ()
    if not isinstance(indices, list) or not all(type(token) is int and 0 <= token < vocab_size for token in indices):
        raise AdapterError(
            f"trainable_token_indices must be a list of tokens below {vocab_size}, the model's vocab_size"
        )
    if len(set(indices)) < len(indices):
        raise AdapterError("trainable_token_indices names a token twice")
    return tuple(indices)
