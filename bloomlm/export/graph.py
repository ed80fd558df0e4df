"""BLOOM's forward pass as pure functions of weights, cache and tokens, which are traced, compiled and shipped.

It states the arithmetic of bloomlm.model a second time, because a program needs other shapes: weights stacked over the
blocks, a cache that is an input and is written in place, and tensors where the model has Python numbers. The tests and
every export compare the two by value.

The cache has rows, each filled as [virtual tokens][tokens] from its first slot on; a call names the rows that it
continues. ALiBi depends on distances only, so the number of a slot serves as the position.

Shapes: R rows of the cache, B rows of a call, S slots that the longest of these uses (the new tokens' included),
M slots of the cache, N packed new tokens, L blocks, H heads, K head_dim, D hidden, V vocabulary, C position columns.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.export.attention import Attention, padded_attention
from bloomlm.export.weight_formats import SUFFIXES, Parts, WeightFormat, format_of
from bloomlm.export.weights import EMBEDDING, FREQUENT, FREQUENT_PLACES, SLOPES
from bloomlm.model.config import BloomConfig

_BLOCK_ELEMENTS = 2**21
"""Elements that library_product decodes at a time: 8 MiB in fp32, which stay in a processor's caches."""
_PAD_SCORE = -1.0e5
"""The score of a pad; beside any real score its softmax is 0 in fp32."""

Weights = Mapping[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Product(Protocol):
    """A product with an encoded matrix."""

    def __call__(self, x: Tensor, parts: Parts, bias: Tensor | None = None, *, is_gelu: bool = False) -> Tensor:
        """x W^T + b, or its GELU in the tanh form: [N, in] -> [N, out]."""
        ...


class Graph(nn.Module):
    """The common part of the functions.

    Args:
        config: the model's shape.
        weights: how matrices are stored.
        product: library_product, or an operator that computes the same.
    """

    def __init__(self, config: BloomConfig, weights: WeightFormat, *, product: Product) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.product = product

    def run(self, tokens: Tensor, weights: Weights, attend: Attend) -> Tensor:
        """From ids [N] to hidden states [N, D] before the last norm.

        Args:
            tokens: [N] int64.
            weights: all weights; see weight_entries.
            attend: from queries, keys and values of the new tokens, [N, H, K] each, and the block's number to [N, D].
        """
        x = self._norm(look_up(tokens, weights, self.weights), weights, "word_embeddings_layernorm")
        for layer in range(self.config.n_layer):
            x = self._block(x, weights, layer, attend)
        return x

    def logits(self, x: Tensor, weights: Weights) -> Tensor:
        """[B, D] hidden states -> [B, V]."""
        return self.product(self._norm(x, weights, "ln_f"), parts_of(weights, EMBEDDING))

    def _block(self, x: Tensor, weights: Weights, layer: int, attend: Attend) -> Tensor:
        shape = (self.config.n_head, 3, self.config.head_dim)
        post_norm = self.config.apply_residual_connection_post_layernorm
        normed = self._norm(x, weights, "input_layernorm", layer)
        query, key, value = self._linear(normed, weights, "query_key_value", layer).unflatten(-1, shape).unbind(2)
        attended = attend(query, key, value, layer)
        x = (normed if post_norm else x) + self._linear(attended, weights, "dense", layer)
        normed = self._norm(x, weights, "post_attention_layernorm", layer)
        hidden = self._linear(normed, weights, "dense_h_to_4h", layer, is_gelu=True)
        return (normed if post_norm else x) + self._linear(hidden, weights, "dense_4h_to_h", layer)

    def _linear(self, x: Tensor, weights: Weights, name: str, layer: int, *, is_gelu: bool = False) -> Tensor:
        return self.product(x, parts_of(weights, name, layer), weights[f"{name}.bias"][layer], is_gelu=is_gelu)

    def _norm(self, x: Tensor, weights: Weights, name: str, layer: int | None = None) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if layer is not None:
            scale, shift = scale[layer], shift[layer]
        return F.layer_norm(x, (self.config.hidden_size,), scale, shift, self.config.layer_norm_epsilon)


class Prefill(Graph):
    """Appends chunks of tokens to rows of the cache.

    Args:
        attention: an operator that computes what slot_attention does; None: PyTorch's attention on padded chunks.
        args, others: the arguments of Graph.
    """

    def __init__(self, *args: Any, attention: Attention | None = None, **others: Any) -> None:
        super().__init__(*args, **others)
        self.attention = attention

    def forward(
        self,
        tokens: Tensor,
        chunks: Tensor,
        slots: Tensor,
        wanted: Tensor,
        rows: Tensor,
        starts: Tensor,
        places: Tensor,
        used: Tensor,
        cache: Sequence[Tensor],
        weights: Weights,
    ) -> Tensor:
        """The logits [W, V] after some of the tokens.

        Args:
            tokens: [N] int64 ids of all chunks, one after another.
            chunks: [N] int64 number of each token's chunk, 0 .. B - 1.
            slots: [N] int64 slot of each token.
            wanted: [W] int64 places among the N of the tokens whose logits are returned; W may be 0.
            rows: [B] int64 row of the cache that each chunk goes to.
            starts: [B] int64 slot of each chunk's first token.
            places: [T] int64, 0 .. T - 1, where T is the length of the longest chunk.
            used: [S] int64, 0 .. S - 1.
            cache: keys of block 0, values of block 0, keys of block 1, ...: [R, H, M, K] each, in the precision that
                weight_formats.cache_dtype gives. The rows hold the virtual and the earlier tokens, and finite numbers
                behind them; they receive the new tokens.
            weights: see weight_entries.
        """
        torch._check(used.shape[0] <= cache[0].shape[2])
        token_rows = rows[chunks]
        attention = self.attention or partial(
            padded_attention, chunks=chunks, chunk_rows=rows, starts=starts, places=places
        )

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            keys, values = cache[2 * layer], cache[2 * layer + 1]
            keys[token_rows, :, slots], values[token_rows, :, slots] = key.to(keys.dtype), value.to(values.dtype)
            return attention(query, keys, values, weights[SLOPES], token_rows, slots, used)

        hidden = self.run(tokens, weights, attend)
        return self.logits(hidden[wanted], weights)


class DecodeStep(Graph):
    """Appends one token to each of some rows.

    Args:
        attention: slot_attention, or an operator that computes the same.
        args, others: the arguments of Graph.
    """

    def __init__(self, *args: Any, attention: Attention, **others: Any) -> None:
        super().__init__(*args, **others)
        self.attention = attention

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        slots: Tensor,
        used: Tensor,
        cache: Sequence[Tensor],
        weights: Weights,
    ) -> Tensor:
        """The logits [B, V] after each token.

        Args:
            tokens: [B] int64.
            rows: [B] int64 row of each token, all different.
            slots: [B] int64 slot of each token, which is the number of slots that its row used before.
            used, cache, weights: see Prefill.
        """
        torch._check(used.shape[0] <= cache[0].shape[2])

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            keys, values = cache[2 * layer], cache[2 * layer + 1]
            keys[rows, :, slots], values[rows, :, slots] = key.to(keys.dtype), value.to(values.dtype)
            return self.attention(query, keys, values, weights[SLOPES], rows, slots, used)

        return self.logits(self.run(tokens, weights, attend), weights)


class Step(Graph):
    """Prefill and decode_step in one, for runtimes whose functions cannot write into their inputs.

    It takes new tokens for every row, and returns the cache with their keys and values appended.
    """

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)
        self.tensors: dict[str, Tensor | list[Tensor]] = {}
        """The weights, as lists where every block has one; they become constants of the traced function."""

    def forward(self, tokens: Tensor, starts: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The logits [B, V] after the last token, and the cache with all tokens.

        Args:
            tokens: [B, T] int64 new tokens, padded on the left.
            starts: [B] int64 first slot of each row without pads, counted over the cache and the new tokens.
            cache: see Prefill; [B, H, S, K] each, S may be 0.
        """
        num_rows, num_new = tokens.shape
        head_dim = self.config.head_dim
        grown: list[Tensor] = []
        slots = torch.arange(cache[0].shape[2] + num_new)
        distance = slots[None] - slots[-num_new:, None]  # [T, S + T]
        bias = self.tensors[SLOPES][:, None, None] * distance.float()  # type: ignore[call-overload]
        hidden_slots = (distance > 0) | (slots < starts[:, None])[:, None]  # [B, T, S + T]
        bias = torch.where(hidden_slots[:, None], _PAD_SCORE, bias)

        def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
            query, key, value = (x.unflatten(0, (num_rows, num_new)).transpose(1, 2) for x in (query, key, value))
            keys = torch.cat((cache[2 * layer], key), dim=2)
            values = torch.cat((cache[2 * layer + 1], value), dim=2)
            grown.extend((keys, values))
            scores = query @ keys.transpose(2, 3) * head_dim**-0.5 + bias
            return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2).flatten(0, 1)

        hidden = self.run(tokens.flatten(), self.tensors, attend)  # type: ignore[arg-type]
        return self.logits(hidden.unflatten(0, (num_rows, num_new))[:, -1], self.tensors), grown  # type: ignore[arg-type]


def library_product(x: Tensor, parts: Parts, bias: Tensor | None = None, *, is_gelu: bool = False) -> Tensor:
    """A Product through PyTorch's in fp32. A matrix in another format is decoded in blocks."""
    weight = parts["weight"]
    if weight.dtype is torch.float32:
        out = F.linear(x, weight)
    else:
        decode, block_rows = format_of(weight.dtype).decode, max(1, _BLOCK_ELEMENTS // x.shape[1])
        blocks = [
            F.linear(x, decode({key: part[start : start + block_rows] for key, part in parts.items()}))
            for start in range(0, weight.shape[0], block_rows)
        ]
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    if bias is not None:
        out = out + bias
    return F.gelu(out, approximate="tanh") if is_gelu else out


def look_up(tokens: Tensor, weights: Weights, format: WeightFormat) -> Tensor:
    """Rows of the embedding in fp32: ids [N] -> [N, D].

    Args:
        tokens: ids.
        weights: those of EMBEDDING, and of FREQUENT where a program has them.
        format: how they are stored.
    """
    found = format.decode({suffix: part[tokens] for suffix, part in parts_of(weights, EMBEDDING).items()})
    if FREQUENT_PLACES not in weights:
        return found
    places = weights[FREQUENT_PLACES][tokens].long()
    rest = format.decode({suffix: part[places.clamp(min=0)] for suffix, part in parts_of(weights, FREQUENT).items()})
    return torch.where(places[:, None] < 0, found, found + rest)


def parts_of(weights: Weights, name: str, layer: int | None = None) -> dict[str, Tensor]:
    """The tensors of one encoded matrix; with layer, in one block."""
    names = {suffix: f"{name}.{suffix}" for suffix in SUFFIXES if f"{name}.{suffix}" in weights}
    return {suffix: weights[full] if layer is None else weights[full][layer] for suffix, full in names.items()}
