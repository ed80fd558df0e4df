"""Which adapter every token of a call uses, for layers that several adapters share (banked.py).

The packed tokens of a call are divided into groups once, and all layers go through the groups. A long run of tokens
with one adapter is a group, because its products are worth their own kernel calls. Short runs, such as the rows that a
decode step continues by one token each, go through the kernels together with all of their adapters.

Shapes: N tokens of a group, K adapters of a group, R sum of the ranks of their updates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

_SHORT_TOKENS = 32
"""The most tokens of a run that shares its kernel calls with runs of other adapters."""


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring tokens, and the adapters that they use."""

    tokens: slice
    """The group's part of the call's tokens."""
    names: tuple[str, ...]
    """Names of the K adapters, sorted."""
    places: Tensor
    """[N] int64 index in `names` of the adapter of each token, K for the base model; [] where all have the same."""
    _factors: dict[tuple[tuple[int, float], ...], Tensor] = field(default_factory=dict)

    def factors(self, updates: tuple[tuple[int, float], ...]) -> Tensor:
        """The factors of the columns of a product with the matrices lora_A of all adapters, one below another.

        Args:
            updates: rank and scaling of the update of each of the K adapters; rank 0 for one without an update.

        Returns:
            [N, R] or [R]: the scaling in the columns of a token's own adapter, 0 in the others.
        """
        if updates not in self._factors:
            ranks = torch.tensor([rank for rank, _ in updates])
            owners = torch.arange(len(updates)).repeat_interleave(ranks)
            scalings = torch.tensor([scaling for _, scaling in updates])[owners]
            owners, scalings = owners.to(self.places.device), scalings.to(self.places.device)
            self._factors[updates] = (owners == self.places[..., None]) * scalings
        return self._factors[updates]


class Selection:
    """The groups of a call's tokens that use an adapter; without groups, all tokens use the base model."""

    def __init__(self) -> None:
        self.groups: tuple[Group, ...] = ()

    def select(self, names: Sequence[str | None], lengths: Sequence[int], device: torch.device) -> None:
        """Set the groups of a call.

        Args:
            names: the adapter of each document; None for the base model.
            lengths: number of tokens of each document, in packed order.
            device: where the tokens are.
        """
        runs: list[list[tuple[str | None, int]]] = []
        for name, documents in groupby(zip(names, lengths, strict=True), key=lambda document: document[0]):
            run = (name, sum(length for _, length in documents))
            if runs and run[1] <= _SHORT_TOKENS and runs[-1][-1][1] <= _SHORT_TOKENS:
                runs[-1].append(run)
            else:
                runs.append([run])
        groups, start = [], 0
        for members in runs:
            stop = start + sum(length for _, length in members)
            used = tuple(sorted({name for name, _ in members if name is not None}))
            if used and stop > start:
                groups.append(Group(slice(start, stop), used, _places(members, used).to(device)))
            start = stop
        self.groups = tuple(groups)

    def clear(self) -> None:
        """Let all tokens use the base model."""
        self.groups = ()


def _places(members: Sequence[tuple[str | None, int]], used: tuple[str, ...]) -> Tensor:
    places = torch.tensor([len(used) if name is None else used.index(name) for name, _ in members])
    if len(members) == 1:
        return places[0]
    return places.repeat_interleave(torch.tensor([length for _, length in members]))
