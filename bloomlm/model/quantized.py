"""Weights in 8 or 4 bits with scales, for weights that do not learn.

int8: symmetric, per output. Row i holds q_i = round(w_i / s_i) with s_i = max |w_i| / 127 in fp32, and stands for
s_i * q_i, which differs from w_i by s_i / 2 at most.

nf4: codes of 4 bits, two in a byte (uint8), for 16 values between -1 and 1 that are quantiles of a normal distribution;
64 weights of a row share a scale, their largest absolute value, in fp32. Source: Dettmers et al., QLoRA,
https://arxiv.org/abs/2305.14314. Codes and values are those of bitsandbytes, which computes them. Scales are not
quantised again ("double quantisation"): that would save 0.37 of 4.5 bits, and rows would share scales.

Products convert some rows at a time back to floating point, so a whole copy never exists. The dtype of a weight tells
its kind.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from bloomlm.errors import CheckpointError, ConfigError

LARGEST = 127
NF4_BLOCK = 64
"""Number of weights that share a scale in nf4, as by default in QLoRA and bitsandbytes."""
BLOCK_ELEMENTS = 2**22
"""Elements that are converted at a time: 16 MiB in fp32, small enough for caches, large enough for GPUs."""

Device = torch.device | str


@cache
def bitsandbytes_functional() -> ModuleType:
    """The module bitsandbytes.functional, which is an extra.

    On some CPUs bitsandbytes advises to install a kernel for a product that nothing here uses; that is not shown.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes.functional")


def weights_per_element(tensor: Tensor) -> int:
    """Number of weights in an element of a parameter: 2 in nf4, else 1."""
    return 2 if tensor.dtype is torch.uint8 else 1


def row_blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a weight [out, in], as many at a time as fit into BLOCK_ELEMENTS."""
    size = max(1, BLOCK_ELEMENTS // (weight.shape[1] * weights_per_element(weight)))
    return (slice(start, min(start + size, len(weight))) for start in range(0, len(weight), size))


def empty_int8(num_rows: int, width: int, device: Device) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [num_rows, width] in int8, not filled."""
    codes = torch.empty(num_rows, width, dtype=torch.int8, device=device)
    return codes, torch.empty(num_rows, dtype=torch.float32, device=device)


def empty_nf4(num_rows: int, width: int, device: Device) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [num_rows, width] in nf4, not filled."""
    codes = torch.empty(num_rows, width // 2, dtype=torch.uint8, device=device)
    return codes, torch.empty(num_rows, width // NF4_BLOCK, dtype=torch.float32, device=device)


def quantize_rows(weight: Tensor, name: str, device: Device = "cpu") -> tuple[Tensor, Tensor]:
    """A floating-point weight as int8 [out, in] and fp32 scales [out].

    Args:
        weight: [out, in]; a memory-mapped weight is read a few rows at a time.
        name: name of the weight, for messages.
        device: where the result goes.

    Raises:
        CheckpointError: the weight holds NaN or infinity, which int8 cannot express.
    """
    quantized, scale = empty_int8(len(weight), weight.shape[1], device)
    for rows in row_blocks(weight):
        block = weight[rows].detach().to(device, torch.float32)
        block_scale = _finite(block.abs().amax(dim=1), name) / LARGEST
        scale[rows] = block_scale
        # a row of zeros has the scale 0, and stays zero whatever it is divided by
        smallest = torch.finfo(torch.float32).tiny
        quantized[rows] = (block / block_scale.clamp_min(smallest)[:, None]).round_()
    return quantized, scale


def quantize_rows_nf4(weight: Tensor, name: str, device: Device = "cpu") -> tuple[Tensor, Tensor]:
    """A floating-point weight as nf4: uint8 [out, in / 2] and fp32 scales [out, in / 64]; see quantize_rows.

    Raises:
        CheckpointError: the weight holds NaN or infinity.
        ConfigError: its rows are not a multiple of 64 long.
    """
    num_rows, width = weight.shape
    if width % NF4_BLOCK:
        raise ConfigError(
            f"{name} has rows of {width} weights, and nf4 needs a multiple of {NF4_BLOCK}; use --base_quantization int8"
        )
    quantize_4bit = bitsandbytes_functional().quantize_4bit
    quantized, scale = empty_nf4(num_rows, width, device)
    for rows in row_blocks(weight):
        block = weight[rows].detach().to(device, torch.float32).contiguous()
        _finite(block.abs().amax(dim=1), name)
        codes, state = quantize_4bit(block, blocksize=NF4_BLOCK, quant_type="nf4")
        quantized[rows], scale[rows] = codes.view(len(block), -1), state.absmax.view(len(block), -1)
    return quantized, scale


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of codes with their scales -> floating point [n, in].

    Args:
        weight: int8 [n, in] or, in nf4, uint8 [n, in / 2].
        scale: fp32 [n] or, in nf4, [n, in / 64].
        dtype: precision of the result.
    """
    if weight.dtype is not torch.uint8:
        rows = weight.to(torch.float32).mul_(scale[:, None])
        return rows.to(dtype)
    functional = bitsandbytes_functional()
    shape = torch.Size((len(weight), 2 * weight.shape[1]))
    state = functional.QuantState(scale.reshape(-1), shape=shape, dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    found: Tensor = functional.dequantize_4bit(weight.reshape(-1, 1), state)
    return found


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a weight are stored."""

    quantize: Callable[[Tensor, str, Device], tuple[Tensor, Tensor]]
    """From a weight [out, in], its name for messages and a device to codes and scales."""
    empty: Callable[[int, int, Device], tuple[Tensor, Tensor]]
    """From the two sizes and a device to codes and scales that are not filled."""


_INT8_ROWS, _NF4_ROWS = RowFormat(quantize_rows, empty_int8), RowFormat(quantize_rows_nf4, empty_nf4)


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantised as they are read."""

    name: str
    """Its name in flags."""
    linear: RowFormat
    """For the linear layers of the blocks."""
    embedding: RowFormat
    """For the embedding, which is also the head."""


INT8 = Quantization("int8", linear=_INT8_ROWS, embedding=_INT8_ROWS)
# QLoRA and bitsandbytes leave embedding and head in 16 bits; in int8 they lose next to nothing
NF4 = Quantization("nf4", linear=_NF4_ROWS, embedding=_INT8_ROWS)
QUANTIZATIONS = {quantization.name: quantization for quantization in (INT8, NF4)}
"""base_quantization -> how."""


def _finite(largest: Tensor, name: str) -> Tensor:
    if not torch.isfinite(largest).all():
        raise CheckpointError(f"{name} holds NaN or infinite numbers, so it cannot be quantised")
    return largest
