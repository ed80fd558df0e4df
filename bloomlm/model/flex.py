"""Packed documents in one call of a block-sparse kernel, for GPUs: torch's FlexAttention under a document mask.

The mask says which blocks of the score matrix are empty, and these cost nothing. ALiBi is in the columns of queries and
keys, as everywhere, so scores need no change. attention.py computes the same with the plain causal kernel, document by
document; the tests compare the two.

Source: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
Shapes: N packed tokens, H heads, E = head_dim + position columns, P virtual tokens.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

OLDEST_GPU = (8, 0)
"""Lowest compute capability that gets the kernel: Ampere."""


@cache
def is_available(device: torch.device) -> bool:
    """Whether the kernel runs on a device: Triton compiles it for recent CUDA GPUs."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= OLDEST_GPU
    )


def attend_documents(
    fused: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    virtual: tuple[Tensor, Tensor] | None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Causal attention within each document.

    Args:
        fused: [N, H, 3, E] queries, keys and values with their position columns.
        lengths: number of tokens of each document; they add up to N.
        scale: factor of the scores.
        virtual: keys and values [H, P, E] that every token sees.
        kernel: torch's flex_attention; None: its compiled form.

    Returns:
        [N, H, E].
    """
    width = fused.shape[-1]
    # torch 2.6 accepts powers of two only, and later versions pad to them
    fused = F.pad(fused, (0, (1 << (width - 1).bit_length()) - width))
    query, key, value = fused.permute(2, 1, 0, 3)
    num_virtual = 0
    if virtual is not None:
        num_virtual = virtual[0].shape[1]
        virtual_key, virtual_value = (F.pad(tensor, (0, fused.shape[-1] - width)) for tensor in virtual)
        key, value = torch.cat((virtual_key, key), dim=1), torch.cat((virtual_value, value), dim=1)
    mask = document_mask(lengths, num_virtual, fused.device)
    kernel = kernel or _compiled_kernel()
    out = kernel(query[None], key[None], value[None], block_mask=mask, scale=scale)
    return out[0, :, :, :width].transpose(0, 1)


@lru_cache(maxsize=2)
def document_mask(lengths: tuple[int, ...], num_virtual: int, device: torch.device) -> "BlockMask":
    """[N, P + N]: a token sees the virtual tokens, itself, and the earlier tokens of its document.

    All blocks of a forward pass, and of its recomputation, share one mask.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    sizes = torch.tensor((num_virtual, *lengths), device=device)
    # the document of each key; virtual tokens are document 0
    document = torch.arange(len(sizes), device=device).repeat_interleave(sizes)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = query + num_virtual
        return (document[key] == 0) | ((document[key] == document[place]) & (key <= place))

    num_tokens = sum(lengths)
    return create_block_mask(sees, None, None, num_tokens, num_virtual + num_tokens, device=device)


@cache
def _compiled_kernel() -> Callable[..., Tensor]:
    # imported here because the import is slow and only GPUs need it
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
