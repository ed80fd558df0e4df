"""Weights in int8 with a scale for each row: a quarter of fp32's memory, for weights that do not learn.

Symmetric, per output: row i holds q_i = round(w_i / s_i) with s_i = max |w_i| / 127 in fp32, and stands for s_i * q_i,
which differs from w_i by s_i / 2 at most. Products convert some rows at a time back to floating point, so a whole copy
never exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bloomlm.errors import CheckpointError

LARGEST = 127
BLOCK_ELEMENTS = 2**22
"""Elements that are converted at a time: 16 MiB in fp32, small enough for caches, large enough for GPUs."""


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight [out, in], as many at a time as fit into BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // weight.shape[1])
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def quantize_rows(weight: Tensor, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """A floating-point weight as int8 [out, in] and fp32 scales [out].

    Args:
        weight: [out, in]; a memory-mapped weight is read a few rows at a time.
        name: name of the weight, for messages.
        device: where the result goes.

    Raises:
        CheckpointError: the weight holds NaN or infinity, which int8 cannot express.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=device)
    for rows in row_blocks(weight):
        block = weight[rows].detach().to(device, torch.float32)
        block_scale = block.abs().amax(dim=1) / LARGEST
        if not torch.isfinite(block_scale).all():
            raise CheckpointError(f"{name} holds NaN or infinite numbers, so it cannot be rounded to int8")
        scale[rows] = block_scale
        # a row of zeros has the scale 0, and stays zero whatever it is divided by
        smallest = torch.finfo(torch.float32).tiny
        quantized[rows] = (block / block_scale.clamp_min(smallest)[:, None]).round_()
    return quantized, scale


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 rows [n, in] with their scales [n] -> floating point."""
    rows = weight.to(torch.float32).mul_(scale[:, None])
    return rows.to(dtype)
