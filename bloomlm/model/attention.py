"""The attention kernels behind one function: documents side by side, virtual tokens in front, or cached keys.

ALiBi arrives inside the columns of queries and keys (see alibi.py), so the plain causal kernel of
scaled_dot_product_attention does all the work and no [heads, T, S] tensor exists. On recent GPUs, documents of
different lengths go through one block-sparse kernel instead (see flex.py).

Shapes: B batch, T new tokens, S cached tokens, N packed tokens, H heads, K head_dim, C position columns,
E = K + C, P virtual tokens.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.kernels.compiled import operators
from bloomlm.model import flex
from bloomlm.model.alibi import key_columns
from bloomlm.model.causal import causal_attention, takes_causal
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import Extension
from bloomlm.model.partition import WHOLE, Partition

Virtual = tuple[Tensor, Tensor] | None
"""Keys and values [H, P, K] of virtual tokens in one block, or None without any."""
SHORT_TOKENS = 128
"""Documents of at most this many tokens are computed together."""
MOST_PADDED = 1.5
"""The most scores that a padded group of documents computes, relative to the scores of the documents alone."""
_BLOCK_QUERIES = 64
_LONGEST_IN_BLOCKS = 1024
"""The most slots over which attention may be computed one block of queries at a time."""


def attend(
    fused: Tensor,
    documents: Documents,
    *,
    head_dim: int,
    virtual: tuple[Tensor, Tensor] | None = None,
    layer: int = 0,
    extension: Extension | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each document.

    Args:
        fused: [N, H, 3, E] queries, keys and values with their position columns.
        documents: the lengths of the documents that the N tokens form.
        head_dim: K; the score scale is K ** -0.5.
        virtual: keys and values [H, P, E] that stand before every document. Rows of a cache that are in use hold
            them already.
        layer: index of the block, for the cache.
        extension: the rows of a cache that the documents continue; they receive the new keys and values.
        dropout: probability on the attention weights.

    Returns:
        [N, H * K] in packed order.
    """
    scale = head_dim**-0.5
    if extension is not None:
        extension.write(layer, fused, virtual)
        if takes_attend(fused, extension):
            return _attend_singles(fused[:, :, 0, :head_dim], layer, extension)
        if extension.is_prefill and takes_causal(fused, dropout):
            own = None if virtual is None else (virtual[0][..., :head_dim], virtual[1][..., :head_dim])
            return causal_attention(fused[..., :head_dim], documents.lengths, extension.cache.slopes, own)
    if extension is None or extension.is_prefill:
        out = _attend_documents(fused, documents, scale, virtual, dropout)
    else:
        out = _attend_cached(fused[:, :, 0], scale, layer, extension)
    return out[..., :head_dim].flatten(1)


class VirtualTokens(nn.Module):
    """A module that gives every block the keys and values of tokens that stand before each document."""

    def __init__(self, num_tokens: int, heads: range) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.heads = heads
        """The heads whose keys and values are needed here."""
        self.partition: Partition = WHOLE
        """Its `enter` is applied to the keys and values before the heads are chosen."""

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """For each block the keys and values, [H, P, K] each, of the heads that are needed here."""
        raise NotImplementedError


def with_columns(tensor: Tensor, columns: Tensor) -> Tensor:
    """[..., K] and [..., C] -> [..., E], in the first one's dtype (every column is exact in 16 bits)."""
    return torch.cat((tensor, columns.to(tensor.dtype).expand(*tensor.shape[:-1], -1)), dim=-1)


def virtual_with_columns(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [H, P, K] of virtual tokens -> [H, P, E]; their positions are -P .. -1."""
    columns = key_columns(torch.arange(-key.shape[1], 0, device=key.device))
    return with_columns(key, columns), with_columns(value, torch.zeros_like(columns))


def _attend_documents(
    fused: Tensor, documents: Documents, scale: float, virtual: tuple[Tensor, Tensor] | None, dropout: float
) -> Tensor:
    lengths = documents.lengths
    if len(set(lengths)) == 1:
        return _causal(fused.unflatten(0, (len(lengths), lengths[0])), scale, virtual, dropout).flatten(0, 1)
    learns = fused.requires_grad or (virtual is not None and virtual[0].requires_grad)
    if learns and not dropout and flex.is_available(fused.device):  # worth compiling in training only
        return flex.attend_documents(fused, lengths, scale, virtual)
    # split's backward is one concatenation; slicing would fill a whole zero tensor for each document
    pieces = fused.split(lengths)
    outs: list[Tensor] = [fused] * len(lengths)
    for group in _groups(lengths):
        longest = lengths[group[0]]
        pads = fused.new_zeros(longest, *fused.shape[1:])
        batch = torch.cat([part for i in group for part in (pieces[i], pads[lengths[i] :])])
        out = _causal(batch.unflatten(0, (len(group), longest)), scale, virtual, dropout).flatten(0, 1)
        parts = out.split([size for i in group for size in (lengths[i], longest - lengths[i])])
        for i, part in zip(group, parts[::2], strict=True):
            outs[i] = part
    return torch.cat(outs)


@lru_cache(maxsize=64)
def _groups(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Documents that go through the kernel together, the longest of each group first.

    A kernel call costs more than the arithmetic of a short document, so short documents of about the same length are
    padded at their ends, where the causal mask hides the pads from real tokens. Long documents go alone.
    """
    groups: list[list[int]] = []
    exact = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        padded = (len(groups[-1]) + 1) * longest**2 if groups else 0
        if 0 < longest <= SHORT_TOKENS and padded <= MOST_PADDED * (exact + lengths[i] ** 2):
            groups[-1].append(i)
            exact += lengths[i] ** 2
        else:
            groups.append([i])
            exact = lengths[i] ** 2
    return tuple(map(tuple, groups))


def _causal(batch: Tensor, scale: float, virtual: tuple[Tensor, Tensor] | None, dropout: float) -> Tensor:
    """[B, T, H, 3, E] -> [B, T, H, E]."""
    query, key, value = batch.permute(3, 0, 2, 1, 4)
    if virtual is not None:
        # P queries whose results are dropped make the score matrix square, which the causal kernel needs
        virtual_key, virtual_value = (tensor.expand(len(batch), -1, -1, -1) for tensor in virtual)
        query = torch.cat((torch.zeros_like(virtual_key), query), dim=2)
        key = torch.cat((virtual_key, key), dim=2)
        value = torch.cat((virtual_value, value), dim=2)
    if _is_faster_in_blocks(key) and not dropout:
        out = _causal_in_blocks(query, key, value, scale)
    else:
        out = _fused_kernel(query, key, value, is_causal=True, scale=scale, dropout_p=dropout)
    return out[:, :, -batch.shape[1] :].transpose(1, 2)


def _fused_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """scaled_dot_product_attention, on a GPU without cuDNN's kernel.

    cuDNN plans every new length for 2 ms or more, and in generation each step has a new one: on an H200 planning took
    three quarters of the time of a step.
    """
    if query.device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return F.scaled_dot_product_attention(query, key, value, mask, **options)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(query, key, value, mask, **options)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _is_faster_in_blocks(key: Tensor) -> bool:
    return (
        key.device.type == "cpu"
        and key.dtype is torch.float32
        and key.shape[2] <= _LONGEST_IN_BLOCKS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _causal_in_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One block of queries at a time, so that scores stay in the processor's caches.

    Args:
        query: [B, H, T, E], the last T of the S tokens.
        key, value: [B, H, S, E].
        scale: the score scale.

    Returns:
        [B, H, T, E].
    """
    num_new, num_before = query.shape[2], key.shape[2] - query.shape[2]
    out = query.new_empty(query.shape[0], num_new, *query.shape[1::2]).transpose(1, 2)
    future = query.new_full((_BLOCK_QUERIES, _BLOCK_QUERIES), -torch.inf).triu_(1)
    for queries, keys, values, outs in zip(query, key, value, out, strict=True):
        for start in range(0, num_new, _BLOCK_QUERIES):
            stop = min(start + _BLOCK_QUERIES, num_new)
            seen = keys[:, : num_before + stop].transpose(1, 2)
            scores = torch.baddbmm(queries.new_empty(1, 1, 1), queries[:, start:stop], seen, beta=0, alpha=scale)
            scores[:, :, num_before + start :] += future[: stop - start, : stop - start]
            outs[:, start:stop] = scores.softmax(-1) @ values[:, : num_before + stop]
    return out


def takes_attend(x: Tensor, extension: Extension) -> bool:
    """Whether our operator computes attention in x's precision: one new token of each row in use, without gradients."""
    return (
        not torch.compiler.is_compiling()
        and operators() is not None
        and extension.is_decode
        and x.device.type == "cpu"
        and x.dtype is extension.cache.keys.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
    )


def _attend_singles(query: Tensor, layer: int, extension: Extension) -> Tensor:
    """[N, H, K] queries of one new token a row -> [N, H * K], by our operator, which reads used slots only."""
    loaded, cache, head_dim = operators(), extension.cache, query.shape[2]
    assert loaded is not None
    keys, values = cache.keys[layer, ..., :head_dim], cache.values[layer, ..., :head_dim]
    out = loaded.attend(query.float(), keys, values, cache.slopes, extension.token_rows, extension.slots)
    return out.to(query.dtype)


def _attend_cached(query: Tensor, scale: float, layer: int, extension: Extension) -> Tensor:
    """[N, H, E] queries of new tokens -> [N, H, E]."""
    keys, values = extension.cache.keys[layer], extension.cache.values[layer]
    out = torch.empty_like(query)
    for call in extension.calls:
        key, value = keys[call.rows, :, : call.num_slots], values[call.rows, :, : call.num_slots]
        if call.places is not None:
            spread = query.new_zeros(len(key), *query.shape[1:])
            spread[call.places] = query[call.tokens]
            found = _fused_kernel(spread[:, :, None], key, value, call.visible, scale=scale)
            out[call.tokens] = found[call.places, :, 0]
            continue
        queries = query[call.tokens].unflatten(0, (len(key), -1)).transpose(1, 2)
        if call.visible is not None and _is_faster_in_blocks(key):
            found = _causal_in_blocks(queries, key, value, scale)
        else:
            found = _fused_kernel(queries, key, value, call.visible, scale=scale)
        found = found.transpose(1, 2).flatten(0, 1)
        if len(extension.calls) == 1:
            return found
        out[call.tokens] = found
    return out
