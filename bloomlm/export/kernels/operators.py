"""The operators of compiled programs: in Python, which the tests compare with, and in C++ for the compiler.

The compiler's own loops convert a matrix to fp32 once for every row of activations, and on AVX2 one number at a time.
Libraries read a weight that is not packed for them at a fraction of the memory's speed. The C++ in this directory reads
weights and cache once, at the memory's speed; docs/decisions/programs.md has the measurements. It becomes part of each
function of a package: for operators that it does not know, the compiler accepts declarations of C functions, and it is
given their definitions instead.

Shapes are those of graph.py.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.export.attention import slot_attention
from bloomlm.export.weights import Parts, format_of
from bloomlm.runtime.formats.pt2 import instruction_set
from bloomlm.runtime.torch_internals import c_function_options

_SOURCES = ("vectors.h", "tensors.h", "matrix.h", "few_rows.cpp", "decoded.cpp", "attend.cpp")
"""The files in the order in which they are joined into one text: headers before the files that include them."""


@torch.library.custom_op("bloomlm::decoded", mutates_args=())
def decoded(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The matrix [out, in] in fp32 that a weight and its scale encode."""
    parts = {"weight": weight} if scale is None else {"weight": weight, "scale": scale}
    return format_of(weight.dtype).decode(parts).clone()


@torch.library.custom_op("bloomlm::few_rows", mutates_args=())
def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x W^T: [N, in] -> [N, out].

    For an int8 matrix the C++ rounds x to 16-bit numbers, with a scale for each quarter of a row, and adds the
    products as whole numbers.
    """
    return F.linear(x, decoded(weight, scale))


@torch.library.custom_op("bloomlm::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """slot_attention as an operator; the C++ reads only the slots that each row uses."""
    used = torch.arange(int(slots.max()) + 1, device=slots.device)
    return slot_attention(query, keys, values, slopes, rows, slots, used)


@decoded.register_fake
def _decoded_shape(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    per_number = 2 if weight.dtype is torch.uint8 else 1
    return weight.new_empty((weight.shape[0], per_number * weight.shape[1]), dtype=torch.float32)


@few_rows.register_fake
def _few_rows_shape(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@attend.register_fake
def _attend_shape(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))


def few_rows_of(x: Tensor, parts: Parts) -> Tensor:
    """few_rows with the tensors of an encoded matrix."""
    out: Tensor = few_rows(x, parts["weight"], parts.get("scale"))
    return out


def decoded_of(parts: Parts) -> Tensor:
    """decoded with the tensors of an encoded matrix."""
    out: Tensor = decoded(parts["weight"], parts.get("scale"))
    return out


def attend_of(
    query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor, used: Tensor
) -> Tensor:
    """attend with slot_attention's arguments."""
    out: Tensor = attend(query, keys, values, slopes, rows, slots)
    return out


def compiler_options() -> Mapping[str, Any] | None:
    """Options that make the compiler use this C++; None if PyTorch cannot do so or the processor has no AVX2."""
    if instruction_set() not in ("x86-64-v3", "x86-64-v4"):
        return None
    operators = [getattr(torch.ops.bloomlm, name).default for name in ("few_rows", "decoded", "attend")]
    return c_function_options(operators, _cpp_source())


def _cpp_source() -> str:
    """All of the C++ as one text, without the includes of its own headers."""
    directory = files("bloomlm.export.kernels")
    lines = [line for name in _SOURCES for line in directory.joinpath(name).read_text(encoding="utf-8").splitlines()]
    return "\n".join(line for line in lines if not line.startswith('#include "'))
