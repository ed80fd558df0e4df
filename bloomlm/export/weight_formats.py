"""The formats of matrices in exported programs: fp32, 16 bits, int8 or int4.

A WeightFormat encodes a matrix as one to three tensors and decodes it.

Shapes: a matrix is [out, in]; int4 has G groups in each row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.quantized import quantize_rows, row_blocks

Parts = Mapping[str, Tensor]
"""The tensors of one encoded matrix, by the last part of their names."""

SUFFIXES = ("weight", "scale", "row_scale")
"""Last parts of the names of an encoded matrix's tensors."""
QUANTIZATIONS = ("none", "int8", "int4")

Representable = Callable[[Tensor], Tensor]
"""From scales [n, G] to the nearest ones that can be stored, in fp32."""
RoundRows = Callable[[Tensor, Representable], tuple[Tensor, Tensor]]
"""From rows [n, in] in fp32 to integers from -8 to 7 in fp32, [n, G, GROUP_SIZE], and the scales [n, G] of groups."""

_INT8_PARTS = 4
"""Parts of a row, each with a scale. kernels/matrix.h has the same number."""
GROUP_SIZE = 16
"""Neighbours in a row that share a scale in int4."""
_LANE_COLUMNS, _MOST_LANES = 32, 16
"""Sizes of int4, which kernels/matrix.h describes and has too, as it has GROUP_SIZE."""
_SCALE_FACTORS = (1.0, 0.775, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.05, 1.1)
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
        """The matrix in fp32; parts may hold some of its rows only."""
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
    """int4 with a scale for each 16 neighbours of a row, itself in int8 beside a number for the row.

    kernels/matrix.h says in which order the numbers lie.
    """

    def entries(self, num_out: int, num_in: int) -> dict[str, TensorEntry]:
        """Bytes of two integers each, and scales."""
        if num_in % _LANE_COLUMNS:
            raise ConfigError(
                f"int4 takes rows in groups of {_LANE_COLUMNS} weights, and a matrix of this model has rows of "
                f"{num_in}; choose --quantization int8"
            )
        return {
            "weight": TensorEntry((num_out, num_in // 2), torch.uint8),
            "scale": TensorEntry((num_out, num_in // GROUP_SIZE), torch.int8),
            "row_scale": TensorEntry((num_out,), torch.float32),
        }

    def encode(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """Round to integers from -8 to 7, with the scale of the least squared error among a few."""
        return self.encode_rows(matrix, name, _nearest_rows)

    def encode_rows(self, matrix: Tensor, name: str, round_rows: RoundRows) -> dict[str, Tensor]:
        """Encode with another way of rounding.

        Args:
            matrix: [out, in].
            name: for messages.
            round_rows: what chooses the integers and scales of some rows.

        Raises:
            CheckpointError: the matrix holds NaN or infinity.
        """
        shapes = self.entries(*matrix.shape)
        parts = {key: torch.empty(entry.shape, dtype=entry.dtype) for key, entry in shapes.items()}
        for rows in row_blocks(matrix):
            block = matrix[rows].float()
            if not torch.isfinite(block).all():
                raise CheckpointError(f"{name} holds NaN or infinite numbers, so it cannot be rounded to int4")
            unit = block.abs().amax(dim=1) / (8 * 127)
            numbers, scale = round_rows(block, partial(_multiple_in_int8, unit=unit[:, None]))
            parts["weight"][rows] = _packed((numbers + 8).to(torch.uint8))
            whole = (scale / torch.where(unit == 0, 1.0, unit)[:, None]).round()
            parts["scale"][rows] = _laned(whole).transpose(2, 3).flatten(1)
            parts["row_scale"][rows] = unit
        return parts

    def decode(self, parts: Parts) -> Tensor:
        """The matrix in fp32."""
        lanes = _num_lanes(2 * parts["weight"].shape[1])
        # both in the order [n, chunk, lane, half, ...], which is that of the columns
        packed = parts["weight"].unflatten(1, (-1, 4, lanes, 4))  # [n, chunk, step, lane, 4]
        numbers = torch.stack((packed & 15, packed >> 4), dim=2).permute(0, 1, 4, 2, 3, 5)
        scale = parts["scale"].unflatten(1, (-1, 2, lanes)).transpose(2, 3) * parts["row_scale"][:, None, None, None]
        return ((numbers.float() - 8.0) * scale[..., None, None]).flatten(1)


def weight_format(quantization: str, dtype: torch.dtype) -> WeightFormat:
    """The format for one of QUANTIZATIONS; without quantisation, plain numbers of a dtype."""
    return format_of({"int8": torch.int8, "int4": torch.uint8}.get(quantization, dtype))


def cache_dtype(weights: WeightFormat) -> torch.dtype:
    """The precision of keys and values in a program: bf16 where matrices are in bf16, otherwise fp32."""
    in_bfloat16 = isinstance(weights, Plain) and weights.dtype is torch.bfloat16
    return torch.bfloat16 if in_bfloat16 else torch.float32


def format_of(dtype: torch.dtype) -> WeightFormat:
    """The format whose stored numbers have a dtype."""
    if dtype is torch.int8:
        return Int8()
    return Int4() if dtype is torch.uint8 else Plain(dtype)


def nearest_int4(block: Tensor, representable: Representable) -> tuple[Tensor, Tensor]:
    """Round groups to whole numbers with a scale each.

    Args:
        block: [n, G, size] in fp32.
        representable: of the scales.

    Returns:
        Integers from -8 to 7 in fp32, [n, G, size], and their scales [n, G].
    """
    # the weight of largest magnitude becomes -8 exactly, whatever its sign
    largest = block.gather(2, block.abs().argmax(dim=2, keepdim=True))[:, :, 0] / -8.0
    best_error, best_numbers, best_scale = None, block, largest
    for factor in _SCALE_FACTORS:
        scale = representable(largest * factor)
        numbers = (block / torch.where(scale == 0, 1.0, scale)[:, :, None]).round().clamp(-8, 7)
        error = (numbers * scale[:, :, None] - block).square().sum(dim=2)
        if best_error is None:
            best_error, best_numbers, best_scale = error, numbers, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_numbers = torch.where(better[:, :, None], numbers, best_numbers)
        best_scale = torch.where(better, scale, best_scale)
    return best_numbers, best_scale


def _nearest_rows(rows: Tensor, representable: Representable) -> tuple[Tensor, Tensor]:
    return nearest_int4(rows.unflatten(1, (-1, GROUP_SIZE)), representable)


def _multiple_in_int8(scale: Tensor, unit: Tensor) -> Tensor:
    return (scale / torch.where(unit == 0, 1.0, unit)).round().clamp(-127, 127) * unit


def _num_lanes(num_in: int) -> int:
    return math.gcd(num_in // _LANE_COLUMNS, _MOST_LANES)


def _laned(groups: Tensor) -> Tensor:
    """[n, G, ...] -> [n, chunk, lane, half, ...]; a lane is two groups."""
    lanes = _num_lanes(groups.shape[1] * GROUP_SIZE)
    return groups.unflatten(1, (-1, lanes, 2))


def _packed(numbers: Tensor) -> Tensor:
    """[n, G, 16] from 0 to 15 -> [n, in / 2] bytes in the order (chunk, step, lane, 4)."""
    low, high = _laned(numbers.unflatten(2, (4, 4))).unbind(3)  # [n, chunk, lane, step, 4]
    return (low | high << 4).transpose(2, 3).flatten(1)
