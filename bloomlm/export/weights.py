"""How an exported program stores its weights: each matrix in fp32, 16 bits, int8 or int4, and all in one file.

A WeightFormat encodes a matrix as one or two tensors and decodes it. In the file every tensor is stacked over the
blocks, so that a program has some twenty inputs and not hundreds. The file is written one matrix at a time: the weights
of a model that load_model has mapped are copied from file to file, and memory holds one matrix in fp32 and its encoded
form.

Shapes: a matrix is [out, in]; int4 has G scales for each row; L blocks, H heads, K head_dim, P virtual tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from bloomlm.checkpoint.merge import merged_parameters
from bloomlm.checkpoint.safetensors_file import build_header, num_bytes, raw_bytes
from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.alibi import head_slopes
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.quantized import quantize_rows, row_blocks
from bloomlm.runtime.manifest import VIRTUAL

Parts = Mapping[str, Tensor]
"""The tensors of one encoded matrix, by the last part of their names."""

EMBEDDING = "word_embeddings"
SLOPES = "head_slopes"
SUFFIXES = ("weight", "scale")
"""Last parts of the names of an encoded matrix's tensors."""
QUANTIZATIONS = ("none", "int8", "int4")

_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTER_NORMS = ("word_embeddings_layernorm", "ln_f")
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
        """Round to integers from -8 to 7, with the scale of the least squared error among a few."""
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
    """The format for one of QUANTIZATIONS; without quantisation, plain numbers of a dtype."""
    return format_of({"int8": torch.int8, "int4": torch.uint8}.get(quantization, dtype))


def format_of(dtype: torch.dtype) -> WeightFormat:
    """The format whose stored numbers have a dtype."""
    if dtype is torch.int8:
        return Int8()
    return Int4() if dtype is torch.uint8 else Plain(dtype)


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


def weight_entries(config: BloomConfig, weights: WeightFormat, num_virtual: int) -> dict[str, TensorEntry]:
    """Name -> shape and dtype of every tensor in the file, in its order."""
    hidden, layers, fp32 = config.hidden_size, config.n_layer, torch.float32
    linears = {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (config.ffn_size, hidden),
        "dense_4h_to_h": (hidden, config.ffn_size),
    }
    entries = {f"{EMBEDDING}.{suffix}": entry for suffix, entry in weights.entries(config.vocab_size, hidden).items()}
    for name, (num_out, num_in) in linears.items():
        for suffix, entry in weights.entries(num_out, num_in).items():
            entries[f"{name}.{suffix}"] = TensorEntry((layers, *entry.shape), entry.dtype)
        entries[f"{name}.bias"] = TensorEntry((layers, num_out), fp32)
    for kind in ("weight", "bias"):
        entries.update({f"{name}.{kind}": TensorEntry((layers, hidden), fp32) for name in _NORMS})
        entries.update({f"{name}.{kind}": TensorEntry((hidden,), fp32) for name in _OUTER_NORMS})
    entries[SLOPES] = TensorEntry((config.n_head,), fp32)
    if num_virtual:
        entries[VIRTUAL] = TensorEntry((layers, 2, config.n_head, num_virtual, config.head_dim), fp32)
    # wide dtypes first, so that every tensor is aligned to its own element size
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_weights(
    path: Path,
    model: BloomForCausalLM,
    weights: WeightFormat,
    entries: Mapping[str, TensorEntry],
    on_parameter: Callable[[], None],
) -> None:
    """Write the file.

    Args:
        path: a new file.
        model: the model; updates of an adapter are merged, and a prefix's keys and values are stored.
        weights: how matrices are stored.
        entries: the result of weight_entries for the model.
        on_parameter: called after each parameter of the model.

    Raises:
        CheckpointError: a weight cannot be stored in this format, or the file cannot be written.
    """
    header, starts = build_header(entries, {"format": "pt"})
    try:
        with path.open("xb") as file:
            file.write(header)
            virtual = virtual_tokens(model)
            if virtual is not None:
                _write_at(file, starts[VIRTUAL], virtual)
            for name, tensor in named_tensors(model, weights, on_parameter):
                name, _, layer = name.partition("@")
                start = starts[name] + (int(layer) * num_bytes(entries[name]) // model.config.n_layer if layer else 0)
                _write_at(file, start, tensor.to(entries[name].dtype))
            file.truncate(max(starts[name] + num_bytes(entry) for name, entry in entries.items()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def virtual_tokens(model: BloomForCausalLM) -> Tensor | None:
    """Keys and values [L, 2, H, P, K] in fp32 that a prefix adapter puts before every prompt; None without one."""
    prefix = model.transformer.prefix
    if prefix is None:
        return None
    with torch.no_grad():
        return torch.stack([torch.stack(block) for block in prefix()]).float()


def named_tensors(
    model: BloomForCausalLM, weights: WeightFormat, on_parameter: Callable[[], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a program except virtual tokens, named NAME or NAME@BLOCK, blocks in order."""
    yield SLOPES, torch.tensor(head_slopes(model.config.n_head))
    for name, parameter in merged_parameters(model, torch.float32):
        *_, module, kind = name.split(".")
        layer = f"@{name.split('.')[2]}" if name.startswith("transformer.h.") else ""
        if parameter.dim() == 1:
            yield f"{module}.{kind}{layer}", parameter
        else:
            for suffix, part in weights.encode(parameter.detach(), name).items():
                yield f"{module}.{suffix}{layer}", part
        if on_parameter is not None:
            on_parameter()


def _write_at(file: BinaryIO, start: int, tensor: Tensor) -> None:
    file.seek(start)
    file.write(raw_bytes(tensor))
