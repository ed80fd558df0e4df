"""Log-probabilities of given tokens, and whether each is the likeliest token, without all logits in memory.

The vocabulary is processed in blocks, whose logits stay in the processor's cache until they are summed. For each row
only four numbers are kept (online softmax, https://arxiv.org/abs/1805.02867): the largest logit so far, its token, the
sum of exponentials relative to it, and the logit of the label.

There are no gradients. Softmax is fp32 (fp64 for fp64 models); the product with the head is in the precision of the
model or of autocast. torch.log_softmax on whole logits is the oracle.

Shapes: M rows, D hidden, V vocabulary (this rank's part of it, where ranks share it).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.model.linear import linear
from bloomlm.parallel.vocabulary_head import Head

IGNORE_INDEX = -100
"""The label of a position from which nothing is predicted."""
_CPU_BLOCK_ELEMENTS = 2**21
"""Number of logits of a block on a CPU: 8 MiB in fp32, which fit into the cache."""
_GPU_BLOCK_ELEMENTS = 2**26
"""Number of logits of a block on a GPU, where small products are slow."""
_FEWEST_COLUMNS = 1024
"""Smallest number of columns of a block, so that its product is fast with many rows too."""


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """One entry for each row."""

    log_probs: Tensor
    """[M]: natural logarithm of the probability of the label."""
    likeliest: Tensor
    """[M] int64: the likeliest token; if several are equally likely, the one with the lowest id."""
    is_likeliest: Tensor
    """[M] bool: whether the label is that token."""


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """Sums over the rows that have a label."""

    loss: Tensor
    """Cross entropy, scalar fp32."""
    num_correct: Tensor
    """Number of rows whose likeliest token is the label, scalar int64."""


@torch.no_grad()
def score_labels(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    block_columns: int | None = None,
) -> LabelScores:
    """Score one label for each hidden state.

    Args:
        hidden: [M, D] after the last layer norm.
        head: gives the logits.
        labels: [M] int64, ids of the whole vocabulary.
        block_columns: number of tokens of a block; None: a number that suits the device.
    """
    weight, ranks = head.weight, head.ranks
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    row_max = torch.full((len(labels),), -torch.inf, dtype=dtype, device=hidden.device)
    row_sum, label_z = torch.zeros_like(row_max), torch.zeros_like(row_max)
    likeliest = torch.zeros_like(labels)
    first_token = 0 if ranks is None else ranks.rank * len(weight)
    size = block_columns or _block_columns(len(labels), hidden.device)
    for start in range(0, len(weight), size):
        columns = slice(start, start + size)
        scale = None if head.weight_scale is None else head.weight_scale[columns]
        z = linear(hidden, weight[columns], None, scale).to(dtype)
        if head.replaced is not None:
            head.replaced.of(columns).put_logits(hidden, z)
        block_max, block_likeliest = z.max(dim=1)
        # strictly larger, so that the first of equal logits stays
        likeliest = torch.where(block_max > row_max, block_likeliest + (first_token + start), likeliest)
        label_z += _pick(z, labels - (first_token + start))
        new_max = torch.maximum(row_max, block_max)
        row_sum = row_sum * (row_max - new_max).exp() + z.sub_(new_max[:, None]).exp_().sum(dim=1)
        row_max = new_max
    if ranks is not None:
        whole_max = ranks.max(row_max.clone())
        row_sum, label_z = ranks.sum(torch.stack((row_sum * (row_max - whole_max).exp(), label_z)))
        nowhere = ranks.degree * len(weight)
        likeliest = ranks.min(likeliest.masked_fill(row_max < whole_max, nowhere))
        row_max = whole_max
    return LabelScores(
        log_probs=label_z - row_max - row_sum.log(), likeliest=likeliest, is_likeliest=likeliest == labels
    )


def score_tokens(hidden: Tensor, head: Head, labels: Tensor) -> TokenScore:
    """Cross entropy and number of correct tokens, without gradients.

    Args:
        hidden: [M, D].
        head: gives the logits.
        labels: [M] int64, IGNORE_INDEX for rows without a label.
    """
    hidden, labels = labelled_rows(hidden, labels)
    scores = score_labels(hidden, head, labels)
    return TokenScore(loss=-scores.log_probs.sum(), num_correct=scores.is_likeliest.sum())


def labelled_rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states [M, D] and the labels [M] of the rows that have a label."""
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(rows) == len(labels):
        return hidden, labels
    return hidden.index_select(0, rows), labels[rows]


def _block_columns(num_rows: int, device: torch.device) -> int:
    elements = _CPU_BLOCK_ELEMENTS if device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    return max(_FEWEST_COLUMNS, elements // max(1, num_rows))


def _pick(z: Tensor, columns: Tensor) -> Tensor:
    """[M, C], [M] -> [M]: the element of each row in the given column; 0 if the block does not have that column."""
    is_here = (columns >= 0) & (columns < z.shape[1])
    return z.gather(1, columns.masked_fill(~is_here, 0)[:, None]).squeeze(1).masked_fill(~is_here, 0.0)
