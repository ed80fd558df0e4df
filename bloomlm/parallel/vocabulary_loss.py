"""Head and cross entropy in one: logits exist for one chunk of rows at a time, and only for rows with a label.

The gradients are computed in the forward pass, while the logits of a chunk exist, so nothing is computed twice. With
logits z, softmax p, label y and smoothing s, d loss / d z = p - (1 - s) onehot(y) - s / V, which replaces z in place.
Then d loss / d hidden = dz @ W and d loss / d W = dz.T @ hidden; the latter is not computed for a frozen head.

If tensor-parallel ranks share the vocabulary, each has the logits of its own tokens. For each row they exchange the
maximum, the sum of exponentials, the logit of the label and (with smoothing) the sum of logits. They sum
d loss / d hidden of a chunk while the next chunk is computed.

Softmax, loss and the weight's gradient are fp32 (fp64 for fp64 inputs); only the matrix products are in half precision,
under autocast and for half-precision inputs. torch.nn.functional.cross_entropy on whole logits is the oracle.

Shapes: M rows, C rows of a chunk, D hidden, V vocabulary (this rank's part of it, where it is shared).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bloomlm.model.embedding import ReplacedRows
from bloomlm.parallel.collectives import TensorParallelGroup
from bloomlm.parallel.vocabulary_head import VocabularyHead
from bloomlm.parallel.vocabulary_scores import labelled_rows

MAX_CHUNK_BYTES = 256 * 2**20
"""Default size of a chunk's fp32 logits."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weight_scale: Tensor | None = None,
    replaced: ReplacedRows | None = None,
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
        labels: [M] int64, IGNORE_INDEX for rows without a label, which cost nothing.
        weight_scale: [V] where the weight is int8 (see model/quantized.py).
        replaced: rows that replace some rows of the weight, with a gradient if they require one.
        scale: factor of the loss, for example loss scale / tokens of the step. It costs nothing here; multiplying the
            result would cost a pass over the weight's gradient.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        max_chunk_bytes: largest size of a chunk of logits.
        ranks: the ranks that share the vocabulary, each with an equal part of the weight's rows. They pass the same
            hidden and labels, and get the same loss and gradient of hidden. None: the weight is whole.
        gradient_memory: tensors that are not needed any more. One of the right shape is removed from the list and
            becomes the weight's gradient; without one, memory is allocated.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs). It can be differentiated once.
    """
    hidden, labels = labelled_rows(hidden, labels)
    if len(labels) == 0:
        # a zero that depends on the same tensors as any other loss, so that their gradients exist
        learned = [weight[:1]] if weight.requires_grad else []
        learned += [] if replaced is None else [replaced.rows]
        return sum((tensor.sum() for tensor in learned), hidden.sum()) * 0.0
    rows, places = (None, None) if replaced is None else (replaced.rows, replaced.places)
    tensors = hidden, weight, rows, places, labels, weight_scale
    loss: Tensor = _LinearCrossEntropy.apply(
        *tensors, scale, label_smoothing, max_chunk_bytes, torch.is_grad_enabled(), ranks, gradient_memory
    )
    return loss


def _exp_and_sum(z: Tensor, row_max: Tensor) -> Tensor:
    """Replace z [C, V] by exp(z - row_max) and return the sum of each row, [C, 1]."""
    return z.sub_(row_max).exp_().sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class _Target:
    """The places of a chunk's labels among this rank's tokens."""

    column: Tensor
    """[C, 1] int64; 0 where another rank has the label."""
    is_here: Tensor | None
    """[C, 1] bool: whether this rank has the label; None: it has all labels."""

    def pick(self, z: Tensor) -> Tensor:
        """[C, V] -> [C, 1]: the element of each label; 0 if another rank has it."""
        picked = z.gather(1, self.column)
        return picked if self.is_here is None else picked.masked_fill(~self.is_here, 0.0)

    def add(self, z: Tensor, values: Tensor) -> None:
        """Add values [C, 1] to the elements of the labels in z [C, V]."""
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
        """The places of labels, [C, 1] ids."""
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
        """Sum several [C, 1] over the ranks in one exchange."""
        if self.ranks is None:
            return parts
        return self.ranks.sum(torch.cat(parts, dim=1)).split(1, dim=1)


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
        rows: Tensor | None,
        places: Tensor | None,
        labels: Tensor,
        weight_scale: Tensor | None,
        scale: float,
        label_smoothing: float,
        max_chunk_bytes: int,
        with_gradients: bool,
        ranks: TensorParallelGroup | None,
        gradient_memory: list[Tensor] | None,
    ) -> Tensor:
        replaced = None if rows is None or places is None else ReplacedRows(places, rows)
        head = VocabularyHead(hidden, weight, max_chunk_bytes, weight_scale, replaced)
        ctx.dtypes = hidden.dtype, weight.dtype, None if replaced is None else replaced.rows.dtype
        grad_hidden = grad_weight = grad_replaced = None
        if with_gradients and any(ctx.needs_input_grad[:3]):
            grad_hidden = hidden.new_empty(hidden.shape, dtype=head.dtype)
            grad_weight = _memory_for(weight, head.dtype, gradient_memory) if ctx.needs_input_grad[1] else None
            if replaced is not None and ctx.needs_input_grad[2]:
                grad_replaced = torch.zeros_like(replaced.rows, dtype=head.dtype)
        loss = torch.zeros((), dtype=head.dtype, device=hidden.device)
        vocabulary = _Vocabulary(len(weight), ranks)
        smoothing_per_token = label_smoothing / vocabulary.size
        ctx.pending = []
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in head.chunks():
                z, target = head.logits(chunk), vocabulary.locate(labels[chunk, None])
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
                head.add_gradients(chunk, z, row_sum.reciprocal(), scale, grad_hidden, grad_weight, grad_replaced)
                del z  # before the next chunk's is made
                if ranks is not None:
                    ctx.pending.append(ranks.begin_sum(grad_hidden[chunk]))
        ctx.gradients = grad_hidden, grad_weight, grad_replaced
        return loss * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not saved tensors: once ctx drops them, the gradient becomes weight.grad without a copy.
        gradients, ctx.gradients = ctx.gradients, (None, None, None)
        if gradients[0] is None:
            raise RuntimeError("linear_cross_entropy can be differentiated once; call it again")
        for work in ctx.pending:
            work.wait()
        # the gradients contain scale already, so the factor is usually 1 and needs no pass over [V, D]
        if grad_output.device.type != "cpu" or float(grad_output) != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *typed, *[None] * 9
