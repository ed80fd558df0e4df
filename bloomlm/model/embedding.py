"""The word embedding, which is also the head, and the ways in which its gradients are added up.

Shapes: N packed tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bloomlm.model.linear import linear
from bloomlm.model.partition import WHOLE_VOCABULARY, VocabularyPartition
from bloomlm.model.quantized import dequantize_rows


@dataclass(frozen=True)
class ReplacedRows:
    """K rows that learn and replace rows of a frozen head."""

    places: Tensor
    """[K] int64 numbers of the replaced rows, all different, in any order."""
    rows: Tensor
    """[K, D] the rows in their places."""

    def of(self, rows: slice) -> "ReplacedRows":
        """The replaced rows within a slice of the weight's rows."""
        chosen = (self.places >= rows.start) & (self.places < rows.stop)
        return ReplacedRows(self.places[chosen] - rows.start, self.rows[chosen])

    def put_logits(self, hidden: Tensor, z: Tensor) -> None:
        """Overwrite the logits z [..., V] of hidden states [..., D] at the replaced rows."""
        if len(self.places):
            z.index_copy_(-1, self.places, linear(hidden, self.rows.to(hidden.dtype)).to(z.dtype))


class GradientParts:
    """The gradient of a weight that is embedding and head, as parts that are added up a block of rows at a time.

    Parts of which a row is computed when it is wanted need less memory than [V, D] while there are few of them, and
    the backward pass goes through all blocks of the model between the head's part and the embedding's.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.of_head: list[Callable[[slice], Tensor]] = []
        """From a slice of the weight's rows to their gradients: a new tensor [rows, D], in the format of products."""
        self._looked_up: list[tuple[Tensor, Tensor]] = []

    def add_looked_up(self, rows: Tensor, grad: Tensor) -> None:
        """Add the gradients [N, D] of rows [N] that were looked up."""
        self._looked_up.append((rows, grad))

    def add_to(self, total: Tensor, rows_at_once: int, *, overwrite: bool) -> None:
        """Add the parts to a tensor [V, D], or overwrite it with their sum; then they are dropped."""
        for block, gradient in self.take(rows_at_once, None if overwrite else total):
            total[block].copy_(gradient)

    def take(self, rows_at_once: int, given: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Every row's gradient, as consecutive slices of rows with tensors [rows, D]; then the parts are dropped.

        A gradient that is given [V, D] is a part, too; one in fp32 or fp64 receives the sum. A single part in the
        weight's format remains in it, with the rows that were also looked up rounded once, as autograd would; otherwise
        results are in fp32 or fp64.
        """
        for start in range(0, len(self.weight), rows_at_once):
            block = slice(start, min(start + rows_at_once, len(self.weight)))
            yield block, self._sum_of(block, None if given is None else given[block])
        self.of_head.clear()
        self._looked_up.clear()

    def _sum_of(self, block: slice, total: Tensor | None) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if total is None and len(self.of_head) == 1:
            total = self.of_head[0](block)
            total = total if total.dtype is self.weight.dtype else total.to(dtype)
        else:
            total = torch.zeros_like(self.weight[block], dtype=dtype) if total is None else total.to(dtype)
            for part in self.of_head:
                total.add_(part(block))
        for rows, grad in self._looked_up:
            chosen = ((rows >= block.start) & (rows < block.stop)).nonzero().squeeze(1)
            places, numbers = (rows[chosen] - block.start).unique(return_inverse=True)
            sums = total[places].to(dtype)
            _add_rows(sums, numbers, grad[chosen])
            total[places] = sums.to(total.dtype)
        return total


class _Lookup(torch.autograd.Function):
    """Rows of a weight, whose gradient goes to a function.

    Autograd would add the weight's gradients up in a new [V, D], whether the lookup's is dense or sparse. The weight
    comes in a list so that autograd does not see it, and `anchor` makes autograd call backward.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, weight: list[Tensor], receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.rows, ctx.receive = rows, receive
        return F.embedding(rows, weight[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.receive(ctx.rows, grad)
        return None, None, None, None


def _add_to_grad(weight: Tensor, rows: Tensor, grad: Tensor) -> None:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    _add_rows(weight.grad, rows, grad)


def _add_rows(total: Tensor, rows: Tensor, grad: Tensor) -> None:
    if total.is_cuda:  # index_add_ adds a row's gradients in any order there, so that runs would not repeat
        total.index_put_((rows,), grad.to(total.dtype), accumulate=True)
    else:
        total.index_add_(0, rows, grad.to(total.dtype))


class _SparseLookup(torch.autograd.Function):
    """Rows of a weight, whose gradient is sparse and has each row once, which makes adding it to another repeatable."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape = rows, weight.shape
        return F.embedding(rows, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.sparse_coo_tensor(ctx.rows[None], grad, ctx.shape, check_invariants=False).coalesce(), None


class WordEmbedding(nn.Embedding):
    """The word embedding, which is also the head."""

    partition: VocabularyPartition = WHOLE_VOCABULARY
    weight_scale: Tensor | None
    """[V] where the weight is quantised (see quantized.py); None where it is floating point."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__(vocab_size, hidden_size)
        self.register_buffer("weight_scale", None, persistent=False)
        self.gradient_parts: GradientParts | None = None
        """Where training collects the gradient instead of in weight.grad; None: it does not."""
        self._adds_to_grad = False

    def reset_parameters(self) -> None:
        """Draw the weight, unless it has no memory yet: to draw nothing, PyTorch would import its compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def choose_gradient(self, *, in_place: bool) -> None:
        """Choose how training adds the gradient of looked-up rows to the head's dense gradient [V, D].

        Args:
            in_place: the backward pass adds the rows to weight.grad itself, so that [V, D] is allocated once. Otherwise
                autograd adds them as a sparse gradient, which a weight needs whose gradient a hook moves elsewhere.
        """
        self._adds_to_grad, self.sparse = in_place, not in_place

    def collect_gradient(self) -> GradientParts:
        """Let training collect the gradient in parts; they belong to the present weight."""
        self.gradient_parts = GradientParts(self.weight)
        return self.gradient_parts

    def forward(self, tokens: Tensor) -> Tensor:
        """[N] ids -> [N, D]; fp32 where the weight is quantised."""
        if self.weight_scale is None:
            return self.partition.look_up(tokens, self.lookup)
        return dequantize_rows(self.weight[tokens], self.weight_scale[tokens], torch.float32)

    def lookup(self, rows: Tensor) -> Tensor:
        """[N] numbers of rows of the weight that is held here -> [N, D]."""
        parts = self.gradient_parts
        if (parts or self._adds_to_grad) and self.weight.requires_grad and torch.is_grad_enabled():
            receive = partial(_add_to_grad, self.weight) if parts is None else parts.add_looked_up
            anchor = torch.empty(0, device=rows.device, requires_grad=True)
            found: Tensor = _Lookup.apply(anchor, rows, [self.weight], receive)
            return found
        if self.sparse:
            sparse: Tensor = _SparseLookup.apply(self.weight, rows)
            return sparse
        return F.embedding(rows, self.weight)

    @property
    def learns(self) -> bool:
        """Whether any of its parameters requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def replaced_rows(self) -> ReplacedRows | None:
        """Rows that stand in for some of the head's weight that is here; None: the weight is all there is."""
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., V] logits."""
        return self.partition.leave(linear(self.partition.enter(hidden), self.weight, None, self.weight_scale))
