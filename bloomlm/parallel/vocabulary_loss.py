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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bloomlm.parallel.vocabulary_head import (
    Head,
    HeadGradients,
    HeadProducts,
    Vocabulary,
    WeightGradient,
    memory_for,
    zero_of,
)
from bloomlm.parallel.vocabulary_scores import labelled_rows

MAX_CHUNK_BYTES = 256 * 2**20
"""Default size of a chunk's fp32 logits."""


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    gradient_memory: list[Tensor] | None = None,
    gradient_parts: list[Callable[[slice], Tensor]] | None = None,
) -> Tensor:
    """scale times the SUM over labelled rows of the cross entropy of the head's logits.

    Args:
        hidden: [M, D].
        head: its weight, and replaced rows, get gradients if they require them.
        labels: [M] int64, IGNORE_INDEX for rows without a label, which cost nothing.
        scale: factor of the loss, for example loss scale / tokens of the step. It costs nothing here; multiplying the
            result would cost a pass over the weight's gradient.
        label_smoothing: as in torch.nn.functional.cross_entropy.
        max_chunk_bytes: largest size of a chunk of logits.
        gradient_memory: tensors that are not needed any more. One of the right shape is removed from the list and
            becomes the weight's gradient; without one, memory is allocated.
        gradient_parts: receives the weight's gradient in the backward pass, as functions from a slice of its rows to
            [rows, D], where that needs less memory than [V, D]; autograd then gets none.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs). It can be differentiated once.
    """
    hidden, labels = labelled_rows(hidden, labels)
    if len(labels) == 0:
        return zero_of(hidden, head)
    options = scale, label_smoothing, max_chunk_bytes, torch.is_grad_enabled()
    room = gradient_memory, gradient_parts if len(labels) <= head.weight.shape[1] else None
    loss: Tensor = _LinearCrossEntropy.apply(hidden, *head.learned, labels, head, *options, room)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        labels: Tensor,
        head: Head,
        scale: float,
        label_smoothing: float,
        max_chunk_bytes: int,
        with_gradients: bool,
        room: tuple[list[Tensor] | None, list[Callable[[slice], Tensor]] | None],
    ) -> Tensor:
        products, vocabulary = HeadProducts(hidden, head, max_chunk_bytes), Vocabulary(head)
        ctx.dtypes = hidden.dtype, weight.dtype, None if rows is None else rows.dtype
        gradient_memory, ctx.gradient_parts = room
        ctx.gradients = None
        if with_gradients and any(ctx.needs_input_grad[:3]):
            grad_weight: Tensor | list[WeightGradient] | None = None
            grad_replaced = None
            if ctx.needs_input_grad[1]:
                grad_weight = memory_for(weight, products.dtype, gradient_memory) if ctx.gradient_parts is None else []
            if rows is not None and ctx.needs_input_grad[2]:
                grad_replaced = torch.zeros_like(rows, dtype=products.dtype)
            grad_hidden = hidden.new_empty(hidden.shape, dtype=products.dtype)
            ctx.gradients = HeadGradients(grad_hidden, grad_weight, grad_replaced)
        loss = torch.zeros((), dtype=products.dtype, device=hidden.device)
        ctx.pending = []
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in products.chunks():
                z, target = products.logits(chunk), vocabulary.locate(labels[chunk, None])
                row_max = vocabulary.row_max(z)
                sums = [target.pick(z), z.row_sum()] if label_smoothing else [target.pick(z)]
                row_sum, label_z, *z_sum = vocabulary.sum(z.exp_and_sum(row_max), *sums)
                shifted_target = (1.0 - label_smoothing) * (label_z - row_max)
                if label_smoothing:
                    shifted_target += label_smoothing * (z_sum[0] / vocabulary.size - row_max)
                loss += (row_sum.log() - shifted_target).sum()
                if ctx.gradients is None:
                    continue
                if label_smoothing:
                    z.subtract(row_sum * (label_smoothing / vocabulary.size))
                target.add(z, row_sum * (label_smoothing - 1.0))
                products.add_gradients(chunk, z, row_sum.reciprocal(), scale, ctx.gradients)
                del z  # before the next chunk's is made
                if head.ranks is not None:
                    ctx.pending.append(head.ranks.begin_sum(ctx.gradients.hidden[chunk]))
        return loss * scale

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not saved tensors: once ctx drops them, the gradient becomes weight.grad without a copy.
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            raise RuntimeError("linear_cross_entropy can be differentiated once; call it again")
        for work in ctx.pending:
            work.wait()
        parts = found.weight if isinstance(found.weight, list) else []
        gradients = found.hidden, None if parts else found.weight, found.replaced
        # the gradients contain scale already, so the factor is usually 1 and needs no pass over [V, D]
        if grad_output.device.type != "cpu" or float(grad_output) != 1.0:
            for gradient in (*gradients, *(part.hidden for part in parts)):
                if gradient is not None:
                    gradient.mul_(grad_output)
        if parts:
            ctx.gradient_parts.extend(parts)
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *typed, *[None] * 7
