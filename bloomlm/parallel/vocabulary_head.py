"""The head's matrix products for chunks of rows: logits, and the gradients that follow from them; and the vocabulary
that tensor-parallel ranks may share.

Rows of the weight may be replaced by rows that learn while the weight does not (see adapters/trained_rows.py). Then the
logits come from the replacements, and only these get a gradient.

Shapes: M rows, C rows of a chunk, D hidden, V vocabulary (this rank's part of it, where it is shared), K replaced rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.model.embedding import ReplacedRows
from bloomlm.model.linear import autocast_dtype, quantized_input_gradient, quantized_product
from bloomlm.model.products import product, uses_onednn, weight_gradient
from bloomlm.parallel.collectives import TensorParallelGroup
from bloomlm.parallel.logits import Logits, block_columns

FP16_HEADROOM = 256.0
"""fp16 only: gradients of logits are multiplied by this, hidden states divided. Probabilities down to 2e-7 then stay
normal numbers, and products stay far below 65504, with any loss scale."""
_BLOCK = 4096


@dataclass(frozen=True)
class Head:
    """The weight of a head and what belongs to it; tensor_parallel.head_of returns that of a model."""

    weight: Tensor
    """[V, D]; without requires_grad no gradient is computed for it."""
    weight_scale: Tensor | None = None
    """[V] where the weight is quantised (see model/quantized.py)."""
    replaced: ReplacedRows | None = None
    """Rows that replace some rows of the weight, with a gradient if they require one."""
    ranks: TensorParallelGroup | None = None
    """The ranks that share the vocabulary, each with an equal part of the weight's rows. They pass the same hidden
    states and labels, and get the same results and gradients of hidden states. None: the weight is whole."""

    @property
    def learned(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the replaced rows."""
        return self.weight, None if self.replaced is None else self.replaced.rows


@dataclass(frozen=True)
class WeightGradient:
    """The gradient of the weight from a chunk of rows, as two factors: [C, V] takes less memory than [V, D]."""

    z: Logits
    """[C, V] gradients of the logits, up to a factor of each row, in the format of the products."""
    hidden: Tensor
    """[C, D] hidden states times that factor."""
    scale: float = 1.0
    """Factor of the product."""

    def __call__(self, tokens: slice) -> Tensor:
        """The gradient of a slice of the weight's rows, [rows, D] in the format of the products; fp32 with a scale."""
        update = weight_gradient(self.z.of(tokens), self.hidden)
        if self.scale == 1.0:
            return update
        return update.to(torch.promote_types(update.dtype, torch.float32)).mul_(self.scale)


@dataclass(frozen=True)
class HeadGradients:
    """Where the gradients of a head's products go."""

    hidden: Tensor
    """[M, D], written."""
    weight: Tensor | list[WeightGradient] | None = None
    """[V, D], or a list that receives a factor pair of each chunk; None: the weight gets no gradient."""
    replaced: Tensor | None = None
    """[K, D], added to; None: the replaced rows get no gradient."""


class HeadProducts:
    """The head's matrix products over chunks of rows, in the precision of the weights or of autocast.

    Results are fp32 or fp64.

    Args:
        hidden: [M, D].
        head: what it is multiplied with.
        max_chunk_bytes: largest size of a chunk of logits.
    """

    def __init__(self, hidden: Tensor, head: Head, max_chunk_bytes: int) -> None:
        weight, replaced = head.weight, head.replaced
        matmul_dtype = autocast_dtype(hidden.device.type) or torch.promote_types(hidden.dtype, weight.dtype)
        self.hidden, self.weight_scale = hidden.to(matmul_dtype), head.weight_scale
        self.weight = weight
        self.replaced = None if replaced is None else ReplacedRows(replaced.places, replaced.rows.to(matmul_dtype))
        self.dtype = torch.promote_types(matmul_dtype, torch.float32)
        self.is_half = matmul_dtype != self.dtype
        self.headroom = FP16_HEADROOM if matmul_dtype is torch.float16 else 1.0
        num_rows, vocab_size = len(hidden), len(weight)
        most_rows = max(1, max_chunk_bytes // (vocab_size * self.dtype.itemsize))
        num_chunks = -(-num_rows // most_rows)
        self.chunk_rows = -(-num_rows // max(1, num_chunks))
        self.uses_onednn = not self.is_half and uses_onednn(self.hidden, self.weight)
        self._in_blocks = self.replaced is None and self.weight_scale is None and (self.uses_onednn or self.is_half)
        # these, oneDNN and quantised weights allocate their results; other products write into this
        allocates = self._in_blocks or self.uses_onednn or self.weight_scale is not None
        rows = 0 if allocates else self.chunk_rows
        self.z = torch.empty(rows, vocab_size, dtype=self.dtype, device=hidden.device)
        # on a CPU in blocks that stay in the processor's cache while they are rounded and used
        self._block = _BLOCK if hidden.device.type == "cpu" else vocab_size
        casts = self.weight_scale is None and weight.dtype != matmul_dtype
        self._rounded = (
            weight.new_empty((min(self._block, vocab_size), weight.shape[1]), dtype=matmul_dtype) if casts else None
        )

    def chunks(self) -> list[slice]:
        """The rows of each chunk, in chunks of nearly equal size."""
        num_rows, size = len(self.hidden), max(1, self.chunk_rows)
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def logits(self, rows: slice) -> Logits:
        """[C, V] logits of a chunk, valid until the next call."""
        hidden = self.hidden[rows]
        if self._in_blocks and self.is_half:
            return Logits(tuple((hidden @ part.t()).to(self.dtype) for _, part in self._half_weight()))
        if self._in_blocks:
            parts = self.weight.split(block_columns(len(hidden), self.dtype.itemsize))
            return Logits(tuple(product(hidden, part) for part in parts))
        z = self._logits_of_weight(hidden)
        if self.replaced is not None:
            z[:, self.replaced.places] = (hidden @ self.replaced.rows.t()).to(z.dtype)
        return Logits((z,))

    def _logits_of_weight(self, hidden: Tensor) -> Tensor:
        if self.uses_onednn:
            return product(hidden, self.weight)
        if self.weight_scale is not None:
            return quantized_product(hidden, self.weight, self.weight_scale).to(self.dtype)
        z = self.z[: len(hidden)]
        if not self.is_half:
            return torch.mm(hidden, self.weight.t(), out=z)
        for tokens, weight in self._half_weight():
            z[:, tokens] = hidden @ weight.t()
        return z

    def _half_weight(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight in 16 bits, block by block; each is valid until the next one."""
        for start in range(0, len(self.weight), self._block):
            tokens = slice(start, start + self._block)
            part = self.weight[tokens]
            yield tokens, part if self._rounded is None else self._rounded[: len(part)].copy_(part)

    def add_gradients(self, rows: slice, z: Logits, row_factor: Tensor, scale: float, into: HeadGradients) -> None:
        """Compute the gradients of a chunk, for which d loss / d logits is z [C, V] times row_factor [C, 1].

        They are multiplied by scale. The contents of z are lost.
        """
        if self.replaced is None:
            self._add_gradients_of_weight(rows, z, row_factor, scale, into)
            return
        own = z.whole[:, self.replaced.places] * (row_factor * scale)
        z.whole[:, self.replaced.places] = 0.0  # the gradients of replaced rows do not belong to the weight
        self._add_gradients_of_weight(rows, z, row_factor, scale, into)
        into.hidden[rows] += own @ self.replaced.rows.to(self.dtype)
        if into.replaced is not None:
            into.replaced.addmm_(own.t(), self.hidden[rows].to(self.dtype))

    def _add_gradients_of_weight(
        self, rows: slice, logits: Logits, row_factor: Tensor, scale: float, into: HeadGradients
    ) -> None:
        hidden = self.hidden[rows]
        if self.uses_onednn:
            parts = [product(block, self.weight[tokens].t()) for tokens, block in logits.with_tokens()]
            into.hidden[rows] = sum(parts[1:], parts[0]).mul_(row_factor * scale)
            if into.weight is not None:
                _add_factors(WeightGradient(logits, hidden * (row_factor * scale)), rows.start == 0, into.weight)
            return
        if self.is_half and self.weight_scale is None:
            self._add_half_gradients(rows, logits, row_factor, scale, into)
            return
        z = logits.whole
        if self.weight_scale is not None:
            z = z.mul_(row_factor * self.headroom).to(hidden.dtype)
            gradient = quantized_input_gradient(z, self.weight, self.weight_scale)
            into.hidden[rows] = gradient.mul_(scale / self.headroom)
            return
        # the row factor is applied to the smaller side of each product
        torch.mm(z, self.weight, out=into.hidden[rows]).mul_(row_factor * scale)
        if isinstance(into.weight, list):
            into.weight.append(WeightGradient(Logits((z.clone(),)), hidden * (row_factor * scale)))
        elif into.weight is not None:
            into.weight.addmm_(z.t(), hidden * (row_factor * scale), beta=0 if rows.start == 0 else 1)

    def _add_half_gradients(
        self, rows: slice, logits: Logits, row_factor: Tensor, scale: float, into: HeadGradients
    ) -> None:
        """Of products in half precision. bf16 has the range for the whole factor before z is rounded, fp16 has not."""
        own_hidden = self.hidden[rows] / self.headroom
        own_scale = scale if self.headroom == 1.0 else self.headroom
        rest, factor = scale / own_scale * self.headroom, row_factor * own_scale
        grad, halves = torch.zeros_like(into.hidden[rows]), []
        for tokens, weight in self._half_weight():
            half_z = logits.of(tokens).mul_(factor).to(own_hidden.dtype)
            grad.add_(half_z @ weight)
            if isinstance(into.weight, Tensor):
                update, part = half_z.t() @ own_hidden, into.weight[tokens]
                part.copy_(update).mul_(rest) if rows.start == 0 else part.add_(update, alpha=rest)
            elif into.weight is not None:
                halves.append(half_z)
        into.hidden[rows] = grad.mul_(scale / own_scale)
        if isinstance(into.weight, list):
            into.weight.append(WeightGradient(Logits(tuple(halves)), own_hidden, rest))


def _add_factors(factors: WeightGradient, is_first: bool, grad_weight: Tensor | list[WeightGradient]) -> None:
    if isinstance(grad_weight, list):
        grad_weight.append(factors)
        return
    # in blocks that stay in the processor's cache until they are added
    for start in range(0, len(grad_weight), _BLOCK):
        tokens = slice(start, start + _BLOCK)
        update = factors(tokens)
        grad_weight[tokens].copy_(update) if is_first else grad_weight[tokens].add_(update)


@dataclass(frozen=True)
class Target:
    """The places of a chunk's labels among this rank's tokens."""

    column: Tensor
    """[C, 1] int64; 0 where another rank has the label."""
    is_here: Tensor | None
    """[C, 1] bool: whether this rank has the label; None: it has all labels."""

    def pick(self, z: Logits) -> Tensor:
        """[C, V] -> [C, 1]: the element of each label; 0 if another rank has it."""
        picked = z.pick(self.column)
        return picked if self.is_here is None else picked.masked_fill(~self.is_here, 0.0)

    def add(self, z: Logits, values: Tensor) -> None:
        """Add values [C, 1] to the elements of the labels in z [C, V]."""
        z.add(self.column, values if self.is_here is None else values * self.is_here)


class Vocabulary:
    """The vocabulary of a head, which may be shared among ranks."""

    def __init__(self, head: Head) -> None:
        self.num_tokens, self.ranks = num_tokens, ranks = len(head.weight), head.ranks
        self.first = 0 if ranks is None else ranks.rank * num_tokens
        self.size = num_tokens * (1 if ranks is None else ranks.degree)
        """Tokens of the whole vocabulary."""

    def locate(self, labels: Tensor) -> Target:
        """The places of labels, [C, 1] ids."""
        if self.ranks is None:
            return Target(labels, None)
        column = labels - self.first
        is_here = (column >= 0) & (column < self.num_tokens)
        return Target(column.masked_fill(~is_here, 0), is_here)

    def row_max(self, z: Logits) -> Tensor:
        """[C, V] -> [C, 1], over the whole vocabulary."""
        own = z.row_max()
        return own if self.ranks is None else self.ranks.max(own)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum several [C, 1] over the ranks in one exchange."""
        if self.ranks is None:
            return parts
        return self.ranks.sum(torch.cat(parts, dim=1)).split(1, dim=1)


def zero_of(hidden: Tensor, head: Head) -> Tensor:
    """A scalar zero, as a loss with labelled rows: of its dtype, and dependent on the same, so that gradients exist."""
    learned = [head.weight[:1]] if head.weight.requires_grad else []
    learned += [] if head.replaced is None else [head.replaced.rows]
    zero = sum((tensor.sum() for tensor in learned), hidden.sum()) * 0.0
    return zero.to(torch.promote_types(zero.dtype, torch.float32))


def memory_for(weight: Tensor, dtype: torch.dtype, spare: list[Tensor] | None) -> Tensor:
    """A tensor of the weight's shape with any contents: one of `spare`, which loses it, or a new one."""
    while spare:
        memory = spare.pop()
        if type(memory) is Tensor and memory.shape == weight.shape and memory.dtype is dtype:
            return memory
    return weight.new_empty(weight.shape, dtype=dtype)
