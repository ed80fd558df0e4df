"""Layers that several adapters share: each token of a call gets what its own adapter computes (selection.py).

The frozen layer's product is computed once for all tokens. For tokens of several adapters, the matrices of the adapters
are stacked, smaller ranks filled up with zeros, and all of their updates are two batched products. Punica
(https://arxiv.org/abs/2310.18547) and S-LoRA (https://arxiv.org/abs/2311.03285) have kernels of their own for that.

Shapes: N tokens of a group, K adapters of a group, S slots of each, R largest rank of these, D hidden, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from bloomlm.adapters.lora_linear import LoRALinear, add_update, low_rank_product
from bloomlm.adapters.selection import MOST_SETS, Group, Names, Selection
from bloomlm.adapters.trained_rows import TrainedRowsEmbedding
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear
from bloomlm.model.partition import Partition

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Update:
    """One adapter's low-rank update of a linear layer, with the values that it is frozen at."""

    lora_a: Tensor
    """[rank, in]."""
    lora_b: Tensor
    """[out, rank]."""
    scaling: float
    row_scales: Tensor | None
    """[out] factors of the rows of the updated weight (DoRA); None: every factor is 1."""

    @classmethod
    def of(cls, layer: LoRALinear) -> "Update":
        """The update of an adapted layer."""
        return cls(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling, layer.row_scale())

    def change(self, y: Tensor, x: Tensor, group: Group, partition: Partition) -> None:
        """Turn the frozen weight's results into those of the group's only adapter, in place.

        Args:
            y: [M, out] results of the call's tokens, without a bias where rows are scaled.
            x: [M, in] their inputs.
            group: the tokens to change.
            partition: of the layer.
        """
        own = y[group.tokens]
        add_update(own, low_rank_product(x[group.tokens], self.lora_a, partition), self.lora_b, self.scaling)
        if self.row_scales is not None:
            own.mul_(self.row_scales)
        group.put(y, own)


@dataclass(frozen=True, eq=False)
class _StackedUpdates:
    """The updates of a group's K adapters; an adapter without one has zeros."""

    lora_a: Tensor
    """[K, R, in]."""
    scaled_b: Tensor
    """[K, R, out] scaling * lora_B^T."""
    row_scales: Tensor | None
    """[K, out] the factors of the rows of each adapter's weight; None: every factor is 1."""

    @classmethod
    def of(cls, updates: Mapping[str, Update], names: Names) -> "_StackedUpdates":
        found = {place: updates[name] for place, name in enumerate(names) if name in updates}
        matrices = [matrix for update in found.values() for matrix in (update.lora_a, update.lora_b)]
        dtype = reduce(torch.promote_types, (matrix.dtype for matrix in matrices))
        largest = max(len(update.lora_a) for update in found.values())
        first = next(iter(found.values()))
        lora_a = first.lora_a.new_zeros(len(names), largest, first.lora_a.shape[1], dtype=dtype)
        scaled_b = first.lora_b.new_zeros(len(names), largest, len(first.lora_b), dtype=dtype)
        for place, update in found.items():
            lora_a[place, : len(update.lora_a)] = update.lora_a
            scaled_b[place, : len(update.lora_a)] = update.scaling * update.lora_b.t()
        row_scales = {name: update.row_scales for name, update in updates.items() if update.row_scales is not None}
        return cls(lora_a, scaled_b, _rows(row_scales, names, 1.0))

    def change(self, y: Tensor, x: Tensor, group: Group, partition: Partition) -> None:
        """As Update.change, for a group of several adapters."""
        inputs = x[group.sources].to(self.lora_a.dtype).unflatten(0, (len(self.lora_a), -1))
        low_rank = partition.between(torch.bmm(inputs, self.lora_a.transpose(1, 2)))
        update = torch.bmm(low_rank, self.scaled_b).flatten(0, 1)[group.slots]
        own = y[group.tokens].add_(update)
        if self.row_scales is not None:
            own.mul_(self.row_scales[group.places])
        group.put(y, own)


class BiasChanges:
    """Differences [n] between the biases of adapters and the base model's, which they replace."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}
        """Name of an adapter -> its difference."""
        self._kept: dict[Names, Tensor | None] = {}

    def remove(self, name: str) -> None:
        """Forget an adapter, which may have no difference here."""
        self.of.pop(name, None)
        self._kept.clear()

    def add_to(self, y: Tensor, selection: Selection) -> None:
        """Add every token's difference to results [N, n] with the base model's bias."""
        for group in selection.groups if self.of else ():
            changes = _remembered(self._kept, group.names, lambda names: _rows(self.of, names, 0.0))
            if changes is not None:
                y[group.tokens] += changes[group.places]


class BankedLinear(Linear):
    """A linear layer that keeps its names, with the updates and biases of several adapters."""

    def __init__(self, linear: Linear, selection: Selection) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias, self.weight_scale = linear.weight, linear.bias, linear.weight_scale
        self.partition = linear.partition
        self.selection = selection
        self.updates: dict[str, Update] = {}
        """Name of an adapter -> its update."""
        self.bias_changes = BiasChanges()
        self._kept: dict[Names, _StackedUpdates | None] = {}

    @property
    def update_matrices(self) -> tuple[Tensor, ...]:
        """The matrices lora_A and lora_B that the current call uses."""
        names = {name for group in self.selection.groups for name in group.names}
        updates = [self.updates[name] for name in sorted(names) if name in self.updates]
        return tuple(matrix for update in updates for matrix in (update.lora_a, update.lora_b))

    def remove(self, name: str) -> None:
        """Forget an adapter, which may have nothing here."""
        self.updates.pop(name, None)
        self.bias_changes.remove(name)
        self._kept.clear()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        found = [(group, self._update(group.names)) for group in self.selection.groups]
        used = [(group, update) for group, update in found if update is not None]
        scales_rows = any(update.row_scales is not None for _, update in used)
        y = self.without_bias(x) if scales_rows else super().forward(x)
        for group, update in used:
            update.change(y, x, group, self.partition)
        if scales_rows:
            y.add_(self.bias)
        self.bias_changes.add_to(y, self.selection)
        return y

    def _update(self, names: Names) -> "Update | _StackedUpdates | None":
        return _remembered(self._kept, names, self._stacked) if len(names) > 1 else self.updates.get(names[0])

    def _stacked(self, names: Names) -> "_StackedUpdates | None":
        return None if self.updates.keys().isdisjoint(names) else _StackedUpdates.of(self.updates, names)


class BankedLayerNorm(nn.LayerNorm):
    """A layer norm that keeps its names, with the biases of several adapters."""

    def __init__(self, norm: nn.LayerNorm, selection: Selection) -> None:
        with torch.device("meta"):
            super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.selection = selection
        self.bias_changes = BiasChanges()

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        y = super().forward(x)
        self.bias_changes.add_to(y, self.selection)
        return y


class BankedEmbedding(WordEmbedding):
    """A word embedding that keeps its name, with the trained rows of several adapters."""

    def __init__(self, embedding: WordEmbedding, selection: Selection, chosen: Selection) -> None:
        """See AdapterBank for the two selections: tokens are looked up, and logits are computed of chosen ones."""
        with torch.device("meta"):
            super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.weight, self.weight_scale = embedding.weight, embedding.weight_scale
        self.partition = embedding.partition
        self.selection, self.chosen = selection, chosen
        self.trained_rows: dict[str, TrainedRowsEmbedding] = {}
        """Name of an adapter -> the embedding with its rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[N] ids -> [N, D]."""
        found = super().forward(tokens)
        for part, rows, is_own in self._uses(self.selection):
            found[part] = torch.where(is_own, rows.put_rows(tokens[part], found[part]), found[part])
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] hidden states of the chosen tokens -> [N, V] logits."""
        z = super().logits(hidden)
        for part, rows, is_own in self._uses(self.chosen):
            replaced = z[part].clone()
            rows.put_logits(hidden[part], replaced)
            z[part] = torch.where(is_own, replaced, z[part])
        return z

    def _uses(self, selection: Selection) -> list[tuple[slice | Tensor, TrainedRowsEmbedding, Tensor]]:
        """Tokens, an embedding with trained rows, and the tokens that use it: [N, 1] bool, or [1] for all or none."""
        return [
            (group.tokens, self.trained_rows[name], (group.places == place)[..., None])
            for group in selection.groups
            for place, name in enumerate(group.names)
            if name in self.trained_rows
        ]


def _remembered(kept: dict[Names, T], names: Names, make: Callable[[Names], T]) -> T:
    """What was made of a set of adapters; kept for as many sets as are used again."""
    if names not in kept:
        if len(kept) == MOST_SETS:
            del kept[next(iter(kept))]
        kept[names] = make(names)
    return kept[names]


def _rows(values: Mapping[str, Tensor], names: Names, default: float) -> Tensor | None:
    """[K, n] the values [n] of each adapter, the default where it has none; None if none of them has."""
    found = [values.get(name) for name in names]
    shape = next((row for row in found if row is not None), None)
    if shape is None:
        return None
    return torch.stack([torch.full_like(shape, default) if row is None else row for row in found])
