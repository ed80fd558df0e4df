"""Log-probabilities of given tokens with gradients: for losses that are no sum over tokens.

As in vocabulary_loss.py, logits exist for one chunk of rows at a time, and only for rows with a label. With logits z,
softmax p and label y, d log_prob / d z = onehot(y) - p. The factor of a row, d loss / d log_prob, is not known before
the backward pass. If the head does not learn, d log_prob / d hidden [M, D] is computed while the logits exist, and the
backward pass multiplies its rows. If it learns, its gradient sums over rows with their factors, so the backward pass
computes the logits again; maximum and sum of each row are kept, so that ranks need not exchange them again.

Shapes: M rows, C rows of a chunk, D hidden, V vocabulary (this rank's part of it, where it is shared).
"""

from typing import Any

import torch
from torch import Tensor

from bloomlm.parallel.vocabulary_head import Head, HeadGradients, HeadProducts, Vocabulary, memory_for, zero_of
from bloomlm.parallel.vocabulary_loss import MAX_CHUNK_BYTES
from bloomlm.parallel.vocabulary_scores import labelled_rows


def linear_log_probs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    gradient_memory: list[Tensor] | None = None,
) -> Tensor:
    """The log-probability of the label of each labelled row under the softmax of the head's logits.

    torch.log_softmax on whole logits is the oracle.

    Args:
        hidden: [N, D].
        head: its weight, and replaced rows, get gradients if they require them.
        labels: [N] int64, IGNORE_INDEX for rows without a label, which cost nothing.
        max_chunk_bytes: largest size of a chunk of logits.
        gradient_memory: as in linear_cross_entropy.

    Returns:
        [M] for the M labelled rows in their order, fp32 (fp64 for fp64 inputs). It can be differentiated once.
    """
    hidden, labels = labelled_rows(hidden, labels)
    if len(labels) == 0:
        return zero_of(hidden, head).expand(0)
    options = max_chunk_bytes, torch.is_grad_enabled(), gradient_memory
    log_probs: Tensor = _LinearLogProbs.apply(hidden, *head.learned, labels, head, *options)
    return log_probs


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        labels: Tensor,
        head: Head,
        max_chunk_bytes: int,
        with_gradients: bool,
        gradient_memory: list[Tensor] | None,
    ) -> Tensor:
        products, vocabulary = HeadProducts(hidden, head, max_chunk_bytes), Vocabulary(head)
        ctx.dtypes = hidden.dtype, weight.dtype, None if rows is None else rows.dtype
        ctx.pending = []
        head_learns = with_gradients and any(ctx.needs_input_grad[1:3])
        keeps_gradient = with_gradients and ctx.needs_input_grad[0] and not head_learns
        ctx.grad_hidden = hidden.new_empty(hidden.shape, dtype=products.dtype) if keeps_gradient else None
        row_max, row_sum, log_probs = (torch.empty_like(labels, dtype=products.dtype) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in products.chunks():
                z, target = products.logits(chunk), vocabulary.locate(labels[chunk, None])
                chunk_max = vocabulary.row_max(z)
                label_z = target.pick(z)
                chunk_sum, label_z = vocabulary.sum(z.exp_and_sum(chunk_max), label_z)
                row_max[chunk], row_sum[chunk] = chunk_max[:, 0], chunk_sum[:, 0]
                log_probs[chunk] = (label_z - chunk_max - chunk_sum.log())[:, 0]
                if ctx.grad_hidden is None:
                    continue
                target.add(z, -chunk_sum)
                products.add_gradients(chunk, z, -chunk_sum.reciprocal(), 1.0, HeadGradients(ctx.grad_hidden))
                del z  # before the next chunk's is made
                if head.ranks is not None:
                    ctx.pending.append(head.ranks.begin_sum(ctx.grad_hidden[chunk]))
        ctx.again = (products, vocabulary, labels, row_max, row_sum, gradient_memory) if head_learns else None
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not saved tensors: once ctx drops them, the gradient becomes weight.grad without a copy.
        grad_hidden, again, ctx.grad_hidden, ctx.again = ctx.grad_hidden, ctx.again, None, None
        gradients: tuple[Tensor | None, ...]
        if again is not None:
            gradients = _gradients_of_head(grad_output, *again, needs_weight=ctx.needs_input_grad[1])
        elif grad_hidden is not None:
            for work in ctx.pending:
                work.wait()
            gradients = grad_hidden.mul_(grad_output[:, None]), None, None
        else:
            raise RuntimeError("linear_log_probs can be differentiated once; call it again")
        typed = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *typed, *[None] * 5


def _gradients_of_head(
    row_factor: Tensor,
    products: HeadProducts,
    vocabulary: Vocabulary,
    labels: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    gradient_memory: list[Tensor] | None,
    *,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of hidden, weight and replaced rows, from d loss / d log_prob [M] and logits that are computed
    again."""
    # the factor's size is applied in fp32, because it contains the loss scale and fp16 overflows
    scale = float(row_factor.abs().max()) or 1.0
    factor = (row_factor / (-scale * row_sum))[:, None]
    grad_hidden = torch.empty_like(products.hidden, dtype=products.dtype)
    grad_weight = memory_for(products.weight, products.dtype, gradient_memory) if needs_weight else None
    grad_replaced = (
        None if products.replaced is None else torch.zeros_like(products.replaced.rows, dtype=products.dtype)
    )
    into = HeadGradients(grad_hidden, grad_weight, grad_replaced)
    pending = []
    for chunk in products.chunks():
        z = products.logits(chunk)
        z.subtract(row_max[chunk, None])
        z.exp()
        vocabulary.locate(labels[chunk, None]).add(z, -row_sum[chunk, None])
        products.add_gradients(chunk, z, factor[chunk], scale, into)
        del z  # before the next chunk's is made
        if vocabulary.ranks is not None:
            pending.append(vocabulary.ranks.begin_sum(grad_hidden[chunk]))
    for work in pending:
        work.wait()
    return grad_hidden, grad_weight, grad_replaced
