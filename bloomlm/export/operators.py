"""The operators of compiled programs: in Python, which the tests compare with, and in C++ for the compiler.

The compiler's own loops convert a matrix to fp32 once for every row of activations, and on AVX2 one number at a time.
Libraries read a weight that is not packed for them at a fraction of the memory's speed. The C++ of bloomlm/kernels
reads weights and cache once, at the memory's speed; docs/decisions/programs.md has the measurements. It becomes part of
each function of a package: for operators that it does not know, the compiler accepts declarations of C functions, and
it is given their definitions instead.

Shapes are those of graph.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.export.attention import slot_attention
from bloomlm.export.weight_formats import Parts, format_of
from bloomlm.kernels.source import cpp_source
from bloomlm.runtime.formats.pt2 import instruction_set
from bloomlm.runtime.torch_internals import c_function_options


@torch.library.custom_op("bloomlm::product", mutates_args=())
def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    is_gelu: bool = False,
) -> Tensor:
    """x W^T + b: [N, in] -> [N, out], for a weight and scales that encode a matrix; with is_gelu, its GELU (tanh form).

    The C++ rounds x: for few rows as the table in matrix.h says, for many rows and a matrix of at most 16 bits to
    bfloat16 on processors that multiply such numbers.
    """
    parts = {"weight": weight, "scale": scale, "row_scale": row_scale}
    matrix = format_of(weight.dtype).decode({name: part for name, part in parts.items() if part is not None})
    out = F.linear(x, matrix, bias)
    return F.gelu(out, approximate="tanh") if is_gelu else out


@torch.library.custom_op("bloomlm::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """slot_attention as an operator; the C++ reads only the slots that each row uses."""
    used = torch.arange(int(slots.max()) + 1, device=slots.device)
    return slot_attention(query, keys, values, slopes, rows, slots, used)


@product.register_fake
def _product_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
    is_gelu: bool = False,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@attend.register_fake
def _attend_shape(query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))


def product_of(x: Tensor, parts: Parts, bias: Tensor | None = None, *, is_gelu: bool = False) -> Tensor:
    """product with the tensors of an encoded matrix."""
    out: Tensor = product(x, parts["weight"], parts.get("scale"), parts.get("row_scale"), bias, is_gelu)
    return out


def attend_of(
    query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor, rows: Tensor, slots: Tensor, used: Tensor
) -> Tensor:
    """attend with slot_attention's arguments."""
    out: Tensor = attend(query, keys, values, slopes, rows, slots)
    return out


def compiler_options() -> Mapping[str, Any] | None:
    """Options that make the compiler use this C++; None if PyTorch cannot do so or the processor has no AVX2."""
    if instruction_set() != "x86-64-v3" or not torch.backends.mkldnn.is_available():
        return None
    operators = [getattr(torch.ops.bloomlm, name).default for name in ("product", "attend")]
    return c_function_options(operators, cpp_source())
