"""The word embedding, which is also the head, and the two ways in which its gradients are added up.

Shapes: N packed tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass
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


class _Lookup(torch.autograd.Function):
    """Rows of a weight, whose gradient goes into weight.grad in place.

    Autograd would add the weight's gradients up in a new [V, D], whether the lookup's is dense or sparse. The weight
    comes in a list so that autograd does not see it, and `anchor` makes autograd call backward.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, weight: list[Tensor]) -> Tensor:
        ctx.rows, ctx.weight = rows, weight[0]
        return F.embedding(rows, weight[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        if weight.is_cuda:  # index_add_ adds a row's gradients in any order there, so that runs would not repeat
            weight.grad.index_put_((ctx.rows,), grad.to(weight.grad.dtype), accumulate=True)
        else:
            weight.grad.index_add_(0, ctx.rows, grad.to(weight.grad.dtype))
        return None, None, None


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
        self._adds_to_grad = False

    def choose_gradient(self, *, in_place: bool) -> None:
        """Choose how training adds the gradient of looked-up rows to the head's dense gradient [V, D].

        Args:
            in_place: the backward pass adds the rows to weight.grad itself, so that [V, D] is allocated once. Otherwise
                autograd adds them as a sparse gradient, which a weight needs whose gradient a hook moves elsewhere.
        """
        self._adds_to_grad, self.sparse = in_place, not in_place

    def forward(self, tokens: Tensor) -> Tensor:
        """[N] ids -> [N, D]; fp32 where the weight is quantised."""
        if self.weight_scale is None:
            return self.partition.look_up(tokens, self.lookup)
        return dequantize_rows(self.weight[tokens], self.weight_scale[tokens], torch.float32)

    def lookup(self, rows: Tensor) -> Tensor:
        """[N] numbers of rows of the weight that is held here -> [N, D]."""
        if self._adds_to_grad and self.weight.requires_grad and torch.is_grad_enabled():
            found: Tensor = _Lookup.apply(torch.empty(0, device=rows.device, requires_grad=True), rows, [self.weight])
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
