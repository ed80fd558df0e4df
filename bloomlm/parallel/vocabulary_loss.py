"""The head and the cross entropy in one: logits exist for a few rows at a time, and only where there is a label.

The gradients are computed in the forward pass, while a chunk's logits exist, so nothing is computed twice. With logits
z, softmax p, label y and smoothing s, d loss / d z = p - (1 - s) onehot(y) - s / V, which replaces z in place; then d
loss / d hidden = dz @ W and d loss / d W = dz.T @ hidden. A frozen head costs no weight gradient.

Where tensor-parallel ranks share the vocabulary, each has the logits of its own tokens only. For each row they exchange
the maximum, the sum of exponentials, the label's logit and (with smoothing) the sum of logits. They add up
d loss / d hidden of each chunk while the next one is computed.

Numerics: softmax, loss and the weight's gradient are fp32 (fp64 for fp64 inputs); under autocast and for half-precision
inputs only the matrix products are in half. torch.nn.functional.cross_entropy on whole logits is the oracle.

Shapes: M rows, C rows of a chunk, D hidden, V vocabulary (this rank's part of it, where it is shared).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bloomlm.model.linear import int8_input_gradient, int8_product, product, uses_onednn
from bloomlm.parallel.collectives import TensorParallelGroup
from bloomlm.parallel.vocabulary_scores import labelled_rows

MAX_CHUNK_BYTES = 256 * 2**20
"""Default size of a chunk's fp32 logits."""
FP16_HEADROOM = 256.0
"""fp16 only: logit gradients are multiplied by this, hidden states divided. Probabilities down to 2e-7 stay normal
numbers and their products stay far from 65504, whatever the loss scale is."""
_BLOCK = 4096


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weight_scale: Tensor | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    ranks: TensorParallelGroup | None = None,
    gradient_memory: list[Tensor] | None = None,
) -> Tensor:
    """scale times the SUM over labelled rows of the cross entropy of hidden @ weight.T.

    Args:
        hidden: [M, D].
        weight: [V, D]; without requires_grad no gradient is computed for it.
        labels: [M] int64, IGNORE_INDEX where a row has none; such rows cost nothing.
        weight_scale: [V] where the weight is int8 (see model/quantized.py).
        scale: factor of the loss, such as the loss scale / tokens of the step. It costs nothing here; applied
            afterwards it would cost a pass over the weight's gradient.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        max_chunk_bytes: size that a chunk's logits may take.
        ranks: those that share the vocabulary, each with an equal part of the weight's rows; hidden and labels are the
            same on each, and so are the loss and hidden's gradient. None: the weight is whole.
        gradient_memory: tensors that are not needed any more. One that fits is removed from the list and becomes the
            weight's gradient, for which new memory is allocated otherwise.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs). It can be differentiated once.
    """
    hidden, labels = labelled_rows(hidden, labels)
    if len(labels) == 0:
        # part of the graph like any other loss, with the same gradients, all of them zero
        return (hidden.sum() + weight[:1].sum() if weight.requires_grad else hidden.sum()) * 0.0
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden,
        weight,
        labels,
        weight_scale,
        scale,
        label_smoothing,
        max_chunk_bytes,
        torch.is_grad_enabled(),
        ranks,
        gradient_memory,
    )
    return loss


def _exp_and_sum(z: Tensor, row_max: Tensor) -> Tensor:
    """Replace z [C, V] by exp(z - row_max); [C, 1] sums."""
    return z.sub_(row_max).exp_().sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class _Target:
    """The places of a chunk's labels among this rank's tokens."""

    column: Tensor
    """[C, 1] int64; 0 where another rank has the label."""
    is_here: Tensor | None
    """[C, 1] bool: whether this rank has the label; None: it has all of them."""

    def pick(self, z: Tensor) -> Tensor:
        """[C, V] -> [C, 1]: each label's element; 0 where another rank has it."""
        picked = z.gather(1, self.column)
        return picked if self.is_here is None else picked.masked_fill(~self.is_here, 0.0)

    def add(self, z: Tensor, values: Tensor) -> None:
        """Add values [C, 1] to each label's element of z [C, V]."""
        z.scatter_add_(1, self.column, values if self.is_here is None else values * self.is_here)


class _Vocabulary:
    """The vocabulary of a head, which may be shared among ranks."""

    def __init__(self, num_tokens: int, ranks: TensorParallelGroup | None) -> None:
        self.num_tokens = num_tokens
        self.ranks = ranks
        self.first = 0 if ranks is None else ranks.rank * num_tokens
        self.size = num_tokens * (1 if ranks is None else ranks.degree)
        """Tokens of the whole vocabulary."""

    def locate(self, labels: Tensor) -> _Target:
        """Find labels, [C, 1] ids."""
        if self.ranks is None:
            return _Target(labels, None)
        column = labels - self.first
        is_here = (column >= 0) & (column < self.num_tokens)
        return _Target(column.masked_fill(~is_here, 0), is_here)

    def row_max(self, z: Tensor) -> Tensor:
        """[C, V] -> [C, 1], over the whole vocabulary."""
        own = z.amax(dim=1, keepdim=True)
        return own if self.ranks is None else self.ranks.max(own)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Add up each of several [C, 1] over the ranks, in one exchange."""
        if self.ranks is None:
            return parts
        return self.ranks.sum(torch.cat(parts, dim=1)).split(1, dim=1)


class _Head:
    """The head's matrix products over chunks of rows, in the precision of the weights or of autocast.

    Results are fp32 or fp64.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, max_chunk_bytes: int, weight_scale: Tensor | None = None
    ) -> None:
        device_type = hidden.device.type
        matmul_dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(device_type):
            matmul_dtype = torch.get_autocast_dtype(device_type)
        self.hidden, self.weight_scale = hidden.to(matmul_dtype), weight_scale
        self.weight = weight.to(matmul_dtype) if weight_scale is None else weight
        self.dtype = torch.promote_types(matmul_dtype, torch.float32)
        self.is_half = matmul_dtype != self.dtype
        self.headroom = FP16_HEADROOM if matmul_dtype is torch.float16 else 1.0
        num_rows, vocab_size = len(hidden), len(weight)
        most_rows = max(1, max_chunk_bytes // (vocab_size * self.dtype.itemsize))
        num_chunks = -(-num_rows // most_rows)
        self.chunk_rows = -(-num_rows // max(1, num_chunks))
        self.uses_onednn = uses_onednn(self.hidden, self.weight)
        # oneDNN and int8 allocate their results; other products write into these
        rows = 0 if self.uses_onednn or weight_scale is not None else self.chunk_rows
        self.z = torch.empty(rows, vocab_size, dtype=self.dtype, device=hidden.device)
        self.half_z = torch.empty_like(self.z, dtype=matmul_dtype) if self.is_half else self.z

    def chunks(self) -> list[slice]:
        """Rows of each chunk; their sizes are as equal as possible."""
        num_rows, size = len(self.hidden), max(1, self.chunk_rows)
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def logits(self, rows: slice) -> Tensor:
        """[C, V], valid until the next call."""
        hidden = self.hidden[rows]
        if self.uses_onednn:
            return product(hidden, self.weight)
        if self.weight_scale is not None:
            return int8_product(hidden, self.weight, self.weight_scale).to(self.dtype)
        z = self.z[: len(hidden)]
        torch.mm(hidden, self.weight.t(), out=self.half_z[: len(hidden)])
        return z.copy_(self.half_z[: len(hidden)]) if self.is_half else z

    def add_gradients(
        self, rows: slice, z: Tensor, row_factor: Tensor, scale: float, grad_hidden: Tensor, grad_weight: Tensor | None
    ) -> None:
        """Gradients of a chunk, whose z [C, V] times row_factor [C, 1] is d loss / d logits, times scale.

        Its rows of grad_hidden [M, D] are set; to grad_weight [V, D] its part is added.
        """
        hidden = self.hidden[rows]
        first = rows.start == 0
        if self.uses_onednn:
            grad_hidden[rows] = product(z, self.weight.t()).mul_(row_factor * scale)
            if grad_weight is not None:
                columns = (hidden * (row_factor * scale)).t()
                # in blocks that stay in the processor's cache until they are added
                for part, z_part in zip(grad_weight.split(_BLOCK), z.split(_BLOCK, dim=1), strict=True):
                    update = product(z_part.t(), columns)
                    part.copy_(update) if first else part.add_(update)
            return
        if self.weight_scale is not None:
            z = z.mul_(row_factor * self.headroom).to(hidden.dtype)
            gradient = int8_input_gradient(z, self.weight, self.weight_scale)
            grad_hidden[rows] = gradient.mul_(scale / self.headroom)
            return
        if not self.is_half:
            # the row factor goes to the small side of each product
            torch.mm(z, self.weight, out=grad_hidden[rows]).mul_(row_factor * scale)
            if grad_weight is not None:
                grad_weight.addmm_(z.t(), hidden * (row_factor * scale), beta=0 if first else 1)
            return
        half_z = torch.mul(z, row_factor * self.headroom, out=self.half_z[: len(hidden)])
        grad_hidden[rows] = (half_z @ self.weight).float().mul_(scale / self.headroom)
        if grad_weight is not None:
            part = half_z.t() @ (hidden / self.headroom)
            if first:
                grad_weight.zero_()
            grad_weight.add_(part, alpha=scale)


def _memory_for(weight: Tensor, dtype: torch.dtype, spare: list[Tensor] | None) -> Tensor:
    while spare:
        memory = spare.pop()
        if type(memory) is Tensor and memory.shape == weight.shape and memory.dtype is dtype:
            return memory
    return weight.new_empty(weight.shape, dtype=dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weight_scale: Tensor | None,
        scale: float,
        label_smoothing: float,
        max_chunk_bytes: int,
        with_gradients: bool,
        ranks: TensorParallelGroup | None,
        gradient_memory: list[Tensor] | None,
    ) -> Tensor:
        head = _Head(hidden, weight, max_chunk_bytes, weight_scale)
        ctx.dtypes = hidden.dtype, weight.dtype
        grad_hidden = grad_weight = None
        if with_gradients and any(ctx.needs_input_grad[:2]):
            grad_hidden = hidden.new_empty(hidden.shape, dtype=head.dtype)
            grad_weight = _memory_for(weight, head.dtype, gradient_memory) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=head.dtype, device=hidden.device)
        vocabulary = _Vocabulary(len(weight), ranks)
        smoothing_per_token = label_smoothing / vocabulary.size
        ctx.pending = []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in head.chunks():
                z, target = head.logits(rows), vocabulary.locate(labels[rows, None])
                row_max = vocabulary.row_max(z)
                sums = [target.pick(z), z.sum(dim=1, keepdim=True)] if label_smoothing else [target.pick(z)]
                row_sum, label_z, *z_sum = vocabulary.sum(_exp_and_sum(z, row_max), *sums)
                shifted_target = (1.0 - label_smoothing) * (label_z - row_max)
                if label_smoothing:
                    shifted_target += label_smoothing * (z_sum[0] / vocabulary.size - row_max)
                loss += (row_sum.log() - shifted_target).sum()
                if grad_hidden is None:
                    continue
                if label_smoothing:
                    z.sub_(row_sum * smoothing_per_token)
                target.add(z, row_sum * (label_smoothing - 1.0))
                head.add_gradients(rows, z, row_sum.reciprocal(), scale, grad_hidden, grad_weight)
                del z  # before the next chunk's is made
                if ranks is not None:
                    ctx.pending.append(ranks.begin_sum(grad_hidden[rows]))
        ctx.gradients = grad_hidden, grad_weight
        return loss * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not saved tensors: once ctx drops them, the gradient becomes weight.grad without a copy.
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, (None, None)
        if grad_hidden is None:
            raise RuntimeError("linear_cross_entropy can be differentiated once; call it again")
        for work in ctx.pending:
            work.wait()
        # the gradients contain scale already, so the factor is usually 1 and needs no pass over [V, D]
        if grad_output.device.type != "cpu" or float(grad_output) != 1.0:
            grad_hidden.mul_(grad_output)
            if grad_weight is not None:
                grad_weight.mul_(grad_output)
        hidden_dtype, weight_dtype = ctx.dtypes
        grad_hidden = grad_hidden.to(hidden_dtype)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_dtype), *[None] * 8
