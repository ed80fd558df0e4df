"""C++ of compiled programs: products with few rows of activations, matrices taken to fp32, attention of a new token.

The compiler's own loops take a matrix to fp32 once for every row of activations, on AVX2 a number at a time; libraries
read a weight that is not packed for them at a fraction of the memory's speed. kernels.cpp reads weights and cache once,
at that speed (docs/decisions/programs.md has the measurements). It is compiled into each function of a package: the
compiler is told of operators, and where it would declare their C functions, this defines them.

Each operator is Python too: the oracle of the C++. Shapes are those of graph.py.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.export.graph import slot_attention
from bloomlm.export.weights import Parts, format_of
from bloomlm.runtime.pt2 import instruction_set

SOURCE = "kernels.cpp"


@torch.library.custom_op("bloomlm::decoded", mutates_args=())
def decoded(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """A matrix [out, in] in fp32 from what stands for it."""
    parts = {"weight": weight} if scale is None else {"weight": weight, "scale": scale}
    return format_of(weight.dtype).decode(parts).clone()


@torch.library.custom_op("bloomlm::few_rows", mutates_args=())
def few_rows(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x W^T: [N, in] -> [N, out].

    For an int8 matrix the C++ takes each quarter of a row of x to 16-bit numbers with one scale, and sums
    whole numbers.
    """
    return F.linear(x, decoded(weight, scale))


@torch.library.custom_op("bloomlm::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """See slot_attention."""
    return slot_attention(query, keys, values, bias)


@decoded.register_fake
def _decoded_shape(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    per_number = 2 if weight.dtype is torch.uint8 else 1
    return weight.new_empty((weight.shape[0], per_number * weight.shape[1]), dtype=torch.float32)


@few_rows.register_fake
def _few_rows_shape(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@attend.register_fake
def _attend_shape(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1] * query.shape[2]))


def few_rows_of(x: Tensor, parts: Parts) -> Tensor:
    """few_rows with the parts of a matrix."""
    out: Tensor = few_rows(x, parts["weight"], parts.get("scale"))
    return out


def decoded_of(parts: Parts) -> Tensor:
    """decoded with the parts of a matrix."""
    out: Tensor = decoded(parts["weight"], parts.get("scale"))
    return out


def compiler_options() -> Mapping[str, Any] | None:
    """What the compiler must be told; None where it cannot be: an older PyTorch, or a processor without AVX2."""
    from torch._inductor import config

    if instruction_set() not in ("x86-64-v3", "x86-64-v4") or not hasattr(config.aot_inductor, "custom_ops_to_c_shims"):
        return None
    source = files("bloomlm.export").joinpath(SOURCE).read_text(encoding="utf-8")
    # put between `extern` and `;`, in a block of extern "C"
    definitions = f'"C++" {{\n{source}\n}}'
    operators = [getattr(torch.ops.bloomlm, name).default for name in ("few_rows", "decoded", "attend")]
    return {
        "aot_inductor.custom_ops_to_c_shims": {operator: [] for operator in operators} | {operators[0]: [definitions]},
        # of the file that the definitions are in
        "aot_inductor.compile_wrapper_opt_level": "O3",
    }
