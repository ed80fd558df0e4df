"""Layers that several adapters share: each token of a call gets what its own adapter computes (selection.py).

The frozen layer's product is computed once for all tokens. The low-rank updates of a group's adapters are two products
for the whole group: with the matrices lora_A one below another, whose result is set to zero outside of each token's own
adapter, and with the matrices lora_B side by side. That reads every adapter's matrices once, as separate products
would, without small kernel calls for each adapter. Punica (https://arxiv.org/abs/2310.18547) and S-LoRA
(https://arxiv.org/abs/2311.03285) have kernels of their own for the same purpose.

Shapes: N tokens, K adapters of a group, R sum of their ranks, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from bloomlm.adapters.lora_linear import LoRALinear, add_update, low_rank_product
from bloomlm.adapters.selection import Group, Selection
from bloomlm.adapters.trained_rows import TrainedRowsEmbedding
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear
from bloomlm.model.partition import Partition

_MOST_SETS = 8
"""Sets of adapters for which a layer keeps joined tensors. The set of a decode step changes when rows come and go."""


@dataclass(frozen=True, eq=False)
class Update:
    """One adapter's low-rank update of a linear layer, with the values that it is frozen at."""

    lora_a: Tensor
    """[rank, in]."""
    lora_b: Tensor
    """[out, rank]."""
    scaling: float
    row_scale: Tensor | None
    """[out] factors of the rows of the updated weight (DoRA); None: every factor is 1."""

    @classmethod
    def of(cls, layer: LoRALinear) -> "Update":
        """The update of an adapted layer."""
        return cls(layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling, layer.row_scale())


@dataclass(frozen=True, eq=False)
class _JoinedUpdates:
    """The updates of a group's adapters, side by side."""

    lora_a: Tensor
    """[R, in]."""
    lora_b: Tensor
    """[out, R]."""
    updates: tuple[tuple[int, float], ...]
    """Rank and scaling for each of the K adapters."""
    row_scales: Tensor | None
    """[K + 1, out] factors of the rows of each adapter's and of the base model's weight; None: every factor is 1."""

    def change(self, y: Tensor, x: Tensor, group: Group, partition: Partition) -> None:
        """Turn the results [N, out] of the frozen weight, without a bias where rows are scaled, into the adapters'."""
        low_rank = low_rank_product(x, self.lora_a, partition)
        add_update(y, low_rank * group.factors(self.updates).to(low_rank.dtype), self.lora_b, 1.0)
        if self.row_scales is not None:
            y.copy_(self.row_scales[group.places] * y)


class BiasChanges:
    """Differences [n] between the biases of adapters and the base model's, which they replace."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}
        """Name of an adapter -> its difference."""
        self._join = lru_cache(_MOST_SETS)(lambda names: _rows(self.of, names, 0.0))

    def remove(self, name: str) -> None:
        """Forget an adapter, which may have no difference here."""
        self.of.pop(name, None)
        self._join.cache_clear()

    def add_to(self, y: Tensor, selection: Selection) -> None:
        """Add every token's difference to results [N, n] with the base model's bias."""
        for group in selection.groups if self.of else ():
            if (changes := self._join(group.names)) is not None:
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
        self._join = lru_cache(_MOST_SETS)(self._joined)

    @property
    def update_matrices(self) -> tuple[Tensor, ...]:
        """The matrices that the current call uses."""
        return tuple(matrix for _, joined in self._used() for matrix in (joined.lora_a, joined.lora_b))

    def remove(self, name: str) -> None:
        """Forget an adapter, which may have nothing here."""
        self.updates.pop(name, None)
        self.bias_changes.remove(name)
        self._join.cache_clear()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        used = self._used()
        scales_rows = any(joined.row_scales is not None for _, joined in used)
        y = self.without_bias(x) if scales_rows else super().forward(x)
        for group, joined in used:
            joined.change(y[group.tokens], x[group.tokens], group, self.partition)
        if scales_rows:
            y.add_(self.bias)
        self.bias_changes.add_to(y, self.selection)
        return y

    def _used(self) -> list[tuple[Group, _JoinedUpdates]]:
        """The groups with an update of this layer."""
        joined = [(group, self._join(group.names)) for group in self.selection.groups]
        return [(group, updates) for group, updates in joined if updates is not None]

    def _joined(self, names: tuple[str, ...]) -> _JoinedUpdates | None:
        found = [self.updates[name] for name in names if name in self.updates]
        if not found:
            return None
        ranks_and_scalings = {name: (len(update.lora_a), update.scaling) for name, update in self.updates.items()}
        row_scales = {name: u.row_scale for name, u in self.updates.items() if u.row_scale is not None}
        return _JoinedUpdates(
            lora_a=torch.cat([update.lora_a for update in found]) if len(found) > 1 else found[0].lora_a,
            lora_b=torch.cat([update.lora_b for update in found], dim=1) if len(found) > 1 else found[0].lora_b,
            updates=tuple(ranks_and_scalings.get(name, (0, 0.0)) for name in names),
            row_scales=_rows(row_scales, names, 1.0),
        )


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

    def _uses(self, selection: Selection) -> list[tuple[slice, TrainedRowsEmbedding, Tensor]]:
        """Tokens, an embedding with trained rows, and the tokens that use it: [N, 1] bool, or [1] for all or none."""
        return [
            (group.tokens, self.trained_rows[name], (group.places == place)[..., None])
            for group in selection.groups
            for place, name in enumerate(group.names)
            if name in self.trained_rows
        ]


def _rows(values: Mapping[str, Tensor], names: Sequence[str], default: float) -> Tensor | None:
    """[K + 1, n] the values of each adapter [n], the default where it has none and for the base model."""
    shape = next((values[name] for name in names if name in values), None)
    if shape is None:
        return None
    default_row = torch.full_like(shape, default)
    return torch.stack([values.get(name, default_row) for name in (*names, "")])
