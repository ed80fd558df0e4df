"""THE table: how tensor-parallel ranks cut every parameter of BLOOM.

Cutting query_key_value and dense_h_to_4h by outputs and dense and dense_4h_to_h by inputs needs one all-reduce a linear
pair in each direction (Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3). Rows of
query_key_value are (head, 3, head_dim), so an equal contiguous cut gives every rank whole heads. The embedding, which
is also the head, is cut by rows of the vocabulary. A parameter that is not cut is whole on every rank.

What an adapter puts beside a weight is cut with that weight: see UPDATE_LAYOUT.
"""

import re
from dataclasses import dataclass

from torch import Tensor

# Parameter, where L stands for any number -> the dimension that is cut; None: whole on every rank.
LAYOUT: dict[str, int | None] = {
    "transformer.word_embeddings.weight": 0,
    "transformer.word_embeddings_layernorm.weight": None,
    "transformer.word_embeddings_layernorm.bias": None,
    "transformer.h.L.input_layernorm.weight": None,
    "transformer.h.L.input_layernorm.bias": None,
    "transformer.h.L.self_attention.query_key_value.weight": 0,
    "transformer.h.L.self_attention.query_key_value.bias": 0,
    "transformer.h.L.self_attention.dense.weight": 1,
    "transformer.h.L.self_attention.dense.bias": None,
    "transformer.h.L.post_attention_layernorm.weight": None,
    "transformer.h.L.post_attention_layernorm.bias": None,
    "transformer.h.L.mlp.dense_h_to_4h.weight": 0,
    "transformer.h.L.mlp.dense_h_to_4h.bias": 0,
    "transformer.h.L.mlp.dense_4h_to_h.weight": 1,
    "transformer.h.L.mlp.dense_4h_to_h.bias": None,
    "transformer.ln_f.weight": None,
    "transformer.ln_f.bias": None,
}
PATTERNS = {re.compile(re.escape(name).replace(r"\.L\.", r"\.\d+\.")): dim for name, dim in LAYOUT.items()}

# Tensor that an adapter puts beside a linear layer's weight -> {dimension along which the weight is cut: dimension
# along which this tensor is cut with it}. Where the weight is cut along another dimension, it is whole on every rank.
UPDATE_LAYOUT = {
    "lora_A": {1: 1},
    "lora_B": {0: 0},
    "lora_B_learns": {0: 0},
    "lora_magnitude_vector": {0: 0},
    "trained_rows": {},
    "trained_tokens": {},
}

# The projection of a prefix is an MLP like a block's, and is cut like one; its embedding is whole on every rank.
PREFIX = "transformer.prefix."
PREFIX_LAYOUT: dict[str, int | None] = {
    "embedding.weight": None,
    "transform.0.weight": 0,
    "transform.0.bias": 0,
    "transform.2.weight": 1,
    "transform.2.bias": None,
}


def tp_dim(name: str) -> int | None:
    """The dimension along which tensor-parallel ranks cut a parameter; None: each rank has the whole.

    Args:
        name: of a parameter of BLOOM or of an adapter, as of model.named_parameters().

    Raises:
        KeyError: there is no such parameter.
    """
    if name.startswith(PREFIX):
        return PREFIX_LAYOUT[name.removeprefix(PREFIX)]
    base, _, kind = name.rpartition(".")
    if kind in UPDATE_LAYOUT:
        weight_dim = tp_dim(f"{base}.weight")
        return None if weight_dim is None else UPDATE_LAYOUT[kind].get(weight_dim)
    for pattern, dim in PATTERNS.items():
        if pattern.fullmatch(name):
            return dim
    raise KeyError(f"{name} is not a parameter of BLOOM or of an adapter")


def is_of_base(name: str) -> bool:
    """Whether BLOOM itself has a parameter of this name; a model's others are those of its adapter."""
    return any(pattern.fullmatch(name) for pattern in PATTERNS)


@dataclass(frozen=True)
class Part:
    """One rank's equal, contiguous part of a tensor that is cut along dim; dim None: all of it."""

    dim: int | None
    index: int
    count: int

    def bounds(self, size: int) -> tuple[int, int]:
        """First row and the one after the last, of size rows along dim."""
        assert size % self.count == 0, (size, self.count)
        rows = size // self.count
        return self.index * rows, (self.index + 1) * rows

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor, as a view."""
        if self.dim is None:
            return tensor
        start, stop = self.bounds(tensor.shape[self.dim])
        return tensor.narrow(self.dim, start, stop - start)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The part's shape."""
        return tuple(size // self.count if dim == self.dim else size for dim, size in enumerate(whole))

    def whole_shape(self, part: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of all parts together."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(part))


def tp_part(name: str, tp_rank: int, tp_degree: int) -> Part:
    """The part of a parameter that a tensor-parallel rank holds."""
    return Part(tp_dim(name), tp_rank, tp_degree)


def dealt_rows(num_rows: int, index: int, count: int) -> tuple[int, int]:
    """First row and the one after the last that FSDP deals to a rank, as torch.chunk does: the first ranks get most."""
    size = -(-num_rows // count)
    return min(num_rows, size * index), min(num_rows, size * (index + 1))
