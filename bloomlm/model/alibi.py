"""ALiBi: head slopes, and the position bias folded into extra query and key columns. Pure functions.

BLOOM adds slope_h * j to the score of head h for the key at position j (Press et al., https://arxiv.org/abs/2108.12409;
the softmax does not see the part that depends on the query alone). Instead of a [H, T, S] bias, which no fused kernel
takes beside its causal mask without reading it from memory, the product is computed by the score itself: the query
gets the slope as extra columns and the key its position, so that the score is scale * (q . k + slope / scale * j).

In 16-bit precision neither factor fits one column, so each is written as a sum of parts of at most 8 significant bits,
which are exact in bfloat16 and in TF32; the kernel adds the products in fp32. A slope takes 3 parts (24 bits, all of
fp32), a position 2 (exact to 65,536).

Shapes: N packed tokens, H heads, K head_dim, C = COLUMNS.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# 3 slope parts x 2 position parts = 6 columns used, 8 keep the head width a multiple of 8 for fused kernels.
COLUMNS = 8
_SLOPE_PARTS = 3
_POSITION_UNIT = 256


class Alibi(NamedTuple):
    """What attention needs of the positions of N packed tokens."""

    slopes: Tensor
    """[H] fp32: the slope of each head that is computed here."""
    columns: Tensor
    """[N, H, 3, C] what fused_columns gives, in the precision of queries and keys."""


def head_slopes(n_head: int) -> list[float]:
    """The slope of each head.

    For a power of two n: 2^(-8/n), 2^(-16/n), ... 2^-8. Otherwise the slopes of the next lower power of two, then
    every other slope of twice that power. Source: the ALiBi paper and its reference code, as BLOOM was trained.
    """
    base = 2 ** math.floor(math.log2(n_head))
    slopes = [2.0 ** (-8.0 * (i + 1) / base) for i in range(base)]
    return slopes + [2.0 ** (-8.0 * (2 * i + 1) / (2 * base)) for i in range(n_head - base)]


def query_columns(slopes: Tensor, head_dim: int) -> Tensor:
    """[H] slopes -> [H, C] fp32 columns that stand beside each head's query (for a score scale of head_dim ** -0.5)."""
    rest = slopes.float() * math.sqrt(head_dim)
    parts = []
    for _ in range(_SLOPE_PARTS):
        part = rest.bfloat16().float()
        parts.append(part)
        rest = rest - part
    columns = torch.stack(parts, dim=-1).repeat_interleave(2, dim=-1)
    return torch.nn.functional.pad(columns, (0, COLUMNS - columns.shape[-1]))


def key_columns(positions: Tensor) -> Tensor:
    """[N] integer positions (any sign) -> [N, C] fp32 columns that stand beside the keys."""
    low = positions.remainder(_POSITION_UNIT)
    columns = torch.stack((positions - low, low), dim=-1).float().repeat(1, _SLOPE_PARTS)
    return torch.nn.functional.pad(columns, (0, COLUMNS - columns.shape[-1]))


def fused_columns(positions: Tensor, query_columns: Tensor) -> Tensor:
    """Columns for a fused query_key_value of N tokens: [N, H, 3, C] fp32, zero beside the values.

    Args:
        positions: [N] integers of any sign.
        query_columns: [H, C] what query_columns gives.
    """
    query = query_columns.expand(len(positions), -1, -1)
    key = key_columns(positions).unsqueeze(1).expand_as(query)
    return torch.stack((query, key, torch.zeros_like(query)), dim=2)
