"""How an exported program stores a matrix (fp32, 16 bits, int8, int4), and the product of such a matrix with many rows.

A WeightFormat encodes a matrix as one or two tensors and decodes it. `many_rows` decodes the matrix block by block and
calls a library's product; kernels/ has the product with few rows.

Shapes: N rows of activations; a matrix is [out, in]; int4 has G scales for each row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.quantized import quantize_rows, row_blocks

Parts = Mapping[str, Tensor]
"""The tensors of one encoded matrix, by the last part of their names."""
Multiply = Callable[[Tensor, Tensor], Tensor]
"""x W^T of fp32 tensors, by a library: [N, in], [out, in] -> [N, out]."""
Decode = Callable[[Parts], Tensor]
"""From the encoded matrix to the matrix in fp32."""

SUFFIXES = ("weight", "scale")
QUANTIZATIONS = ("none", "int8", "int4")

_BLOCK_ELEMENTS = 2**21
"""Elements that many_rows decodes at a time: 8 MiB in fp32, which stay in a processor's caches until they are used."""
_INT8_PARTS = 4
"""Parts of a row, each with a scale. kernels/matrix.h has the same number."""
_GROUP_SIZE = 32
"""Weights of a row that share a scale in int4."""
_SCALE_FACTORS = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)
"""Candidates, relative to the scale that spans a group; a smaller scale clips the largest weight and is finer for the
others."""


class WeightFormat(Protocol):
    """One way of storing a matrix [out, in]."""

    def entries(self, num_out: int, num_in: int) -> dict[str, TensorEntry]:
        """Shapes and dtypes of the tensors that `encode` returns."""
        ...

    def encode(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """The tensors that store a matrix; name is for messages."""
        ...

    def decode(self, parts: Parts) -> Tensor:
        """The matrix in fp32, or those of its rows that the parts hold."""
        ...


@dataclass(frozen=True)
class Plain:
    """Floating-point numbers without quantisation."""

    dtype: torch.dtype

    def entries(self, num_out: int, num_in: int) -> dict[str, TensorEntry]:
        """The matrix itself."""
        return {"weight": TensorEntry((num_out, num_in), self.dtype)}

    def encode(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """The matrix, rounded to the dtype."""
        return {"weight": matrix.to(self.dtype)}

    def decode(self, parts: Parts) -> Tensor:
        """The matrix in fp32."""
        return parts["weight"].float()


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 with a scale for each quarter of a row, given by its largest absolute value."""

    def entries(self, num_out: int, num_in: int) -> dict[str, TensorEntry]:
        """Integers and scales."""
        if num_in % _INT8_PARTS:
            raise ConfigError(
                f"int8 takes rows in {_INT8_PARTS} parts, and a matrix of this model has rows of {num_in} weights; "
                "choose --quantization none"
            )
        return {
            "weight": TensorEntry((num_out, num_in), torch.int8),
            "scale": TensorEntry((num_out, _INT8_PARTS), torch.float32),
        }

    def encode(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """Round to the nearest multiple of the scale, from -127 to 127."""
        weight, scale = quantize_rows(matrix.reshape(-1, matrix.shape[1] // _INT8_PARTS), name)
        return {"weight": weight.view(matrix.shape), "scale": scale.view(-1, _INT8_PARTS)}

    def decode(self, parts: Parts) -> Tensor:
        """The matrix in fp32."""
        return (parts["weight"].unflatten(1, (_INT8_PARTS, -1)).float() * parts["scale"][:, :, None]).flatten(1)


@dataclass(frozen=True)
class Int4:
    """int4 in groups of 32 with a scale each, two numbers in a byte.

    A group is every G-th weight of a row, not 32 neighbours, so that neighbouring weights have neighbouring scales.
    Byte j of a row holds the integers of columns j (low half) and j + in / 2 (high half), each plus 8.
    """

    def entries(self, num_out: int, num_in: int) -> dict[str, TensorEntry]:
        """Bytes of two integers each, and scales."""
        if num_in % _GROUP_SIZE:
            raise ConfigError(
                f"int4 takes rows in groups of {_GROUP_SIZE} weights, and a matrix of this model has rows of {num_in}; "
                "choose --quantization int8"
            )
        return {
            "weight": TensorEntry((num_out, num_in // 2), torch.uint8),
            "scale": TensorEntry((num_out, num_in // _GROUP_SIZE), torch.bfloat16),
        }

    def encode(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """Round to integers from -8 to 7, with the one of a few scales that has the least squared error."""
        num_out, num_in = matrix.shape
        shapes = self.entries(num_out, num_in)
        parts = {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in shapes.items()}
        for rows in row_blocks(matrix):
            block = matrix[rows].float().unflatten(1, (_GROUP_SIZE, -1))
            if not torch.isfinite(block).all():
                raise CheckpointError(f"{name} holds NaN or infinite numbers, so it cannot be rounded to int4")
            numbers, scale = nearest_int4(block, torch.bfloat16)
            low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=1)
            parts["weight"][rows] = (low | high << 4).flatten(1)
            parts["scale"][rows] = scale
        return parts

    def decode(self, parts: Parts) -> Tensor:
        """The matrix in fp32."""
        groups = parts["scale"].shape[1]
        packed = parts["weight"].unflatten(1, (-1, groups))
        numbers = torch.cat((packed & 15, packed >> 4), dim=1).float() - 8.0
        return (numbers * parts["scale"][:, None].float()).flatten(1)


def weight_format(quantization: str, dtype: torch.dtype) -> WeightFormat:
    """The format that the flags ask for.

    Args:
        quantization: one of QUANTIZATIONS.
        dtype: precision without quantisation.
    """
    if quantization == "none":
        return Plain(dtype)
    return Int8() if quantization == "int8" else Int4()


def format_of(dtype: torch.dtype) -> WeightFormat:
    """The format whose weights have this dtype."""
    if dtype is torch.int8:
        return Int8()
    return Int4() if dtype is torch.uint8 else Plain(dtype)


def many_rows(x: Tensor, parts: Parts, *, decode: Decode, multiply: Multiply = F.linear) -> Tensor:
    """x W^T through a library's fp32 product: [N, in] -> [N, out].

    Args:
        x: [N, in].
        parts: the encoded matrix.
        decode: decodes a block of at most _BLOCK_ELEMENTS elements.
        multiply: the product with a decoded block.
    """
    if parts["weight"].dtype is torch.float32:
        return multiply(x, parts["weight"])
    num_out, block_rows = parts["weight"].shape[0], max(1, _BLOCK_ELEMENTS // x.shape[1])
    blocks = [
        multiply(x, decode({key: part[start : start + block_rows] for key, part in parts.items()}))
        for start in range(0, num_out, block_rows)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def nearest_int4(block: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n, 32, G] in fp32 -> integers from -8 to 7 in fp32, and scales [n, G]."""
    # the weight of largest magnitude becomes -8 exactly, whatever its sign
    largest = block.gather(1, block.abs().argmax(dim=1, keepdim=True)) / -8.0
    best_error, best_numbers, best_scale = None, block, largest
    for factor in _SCALE_FACTORS:
        scale = (largest * factor).to(scale_dtype).float()
        numbers = (block / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
        error = (numbers * scale - block).square().sum(dim=1, keepdim=True)
        if best_error is None:
            best_error, best_numbers, best_scale = error, numbers, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_numbers, best_scale = torch.where(better, numbers, best_numbers), torch.where(better, scale, best_scale)
    return best_numbers, best_scale[:, 0].to(scale_dtype)
