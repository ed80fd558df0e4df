"""Attention of new tokens over the slots of their rows, in PyTorch's operators, for the functions of graph.py.

Shapes: R rows of the cache, B rows of a call, S slots that the longest of these uses, M slots of the cache, N packed
tokens, T tokens of the longest chunk, H heads, K head_dim, C position columns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.model.alibi import COLUMNS, key_columns, query_columns

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""slot_attention, or an operator that computes the same."""


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor, used: Tensor
) -> Tensor:
    """Attention of one new token a row over the slots up to its own: [B, H * K].

    Args:
        query: [B, H, K].
        keys, values: [R, H, M, K] each.
        slopes: [H] slopes of ALiBi.
        rows: [B] int64 row of each token.
        slots: [B] int64 slot of each token.
        used: [S] int64, 0 .. S - 1, where S is the largest of slots + 1.
    """
    num_slots, head_dim = used.shape[0], query.shape[2]
    keys, values = (part.narrow(2, 0, num_slots)[rows].to(query.dtype) for part in (keys, values))
    distance = used - slots[:, None]  # [B, S]
    bias = slopes[:, None] * distance[:, None].to(slopes.dtype)
    bias = torch.where((distance > 0)[:, None], -torch.inf, bias)
    scores = (query[:, :, None] * keys).sum(-1) * head_dim**-0.5 + bias
    return (scores.softmax(-1)[..., None] * values).sum(2).flatten(1)


def padded_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slopes: Tensor,
    rows: Tensor,
    slots: Tensor,
    used: Tensor,
    *,
    chunks: Tensor,
    chunk_rows: Tensor,
    starts: Tensor,
    places: Tensor,
) -> Tensor:
    """slot_attention for chunks of tokens, padded to the longest one: B * T * S scores a head.

    Args:
        query, keys, values, slopes, rows, slots, used: see slot_attention, with N new tokens for its B.
        chunks, chunk_rows, starts, places: see Prefill.
    """
    num_slots, head_dim = used.shape[0], query.shape[2]
    keys, values = (part.narrow(2, 0, num_slots)[chunk_rows].to(query.dtype) for part in (keys, values))
    queries = query.new_zeros(chunk_rows.shape[0], query.shape[1], places.shape[0], head_dim)
    own_places = slots - starts[chunks]
    queries[chunks, :, own_places] = query
    out = F.scaled_dot_product_attention(
        _beside(queries, query_columns(slopes, head_dim)[None, :, None]),
        _beside(keys, key_columns(used)),
        F.pad(values, (0, COLUMNS)),
        attn_mask=(used <= (starts[:, None] + places)[..., None])[:, None],
        scale=head_dim**-0.5,
    )
    return out[chunks, :, own_places][..., :head_dim].flatten(1)


def _beside(tensor: Tensor, columns: Tensor) -> Tensor:
    """[B, H, S, K] and columns that expand to [B, H, S, C] -> [B, H, S, K + C]."""
    return torch.cat((tensor, columns.expand(*tensor.shape[:-1], -1)), dim=-1)
