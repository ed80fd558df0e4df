"""Which adapter every token of a call uses, for layers that several adapters share (banked.py).

The packed tokens of a call are divided into groups once, and all layers go through the groups. A long run of tokens
with one adapter is a group, because its products are worth their own kernel calls. Short runs, such as the rows that a
decode step continues by one token each, go through the kernels together with all of their adapters: the tokens of each
adapter are then padded to the same number (slots).

Shapes: N tokens of a group, K adapters of a group, S slots of each adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

_SHORT_TOKENS = 32
"""The most tokens of a run that shares its kernel calls with runs of other adapters."""


MOST_SETS = 2
"""Sets of several adapters that have been used last, for which layers keep stacked tensors."""

Names = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Tokens of a call that use adapters."""

    tokens: slice | Tensor
    """The N tokens, neighbours or [N] int64."""
    names: Names
    """Names of the K adapters, sorted; the tokens need not use all of them."""
    places: Tensor
    """[N] int64 index in `names` of each token's adapter; a single 0 [] where there is one."""
    sources: Tensor
    """[K * S] the token of the call that stands in each slot; pads repeat the first token. Empty where K is 1."""
    slots: Tensor
    """[N] the slot of each token. Empty where K is 1."""

    @classmethod
    def of(cls, names: Names, owners: Sequence[str], positions: Sequence[int], device: torch.device) -> "Group":
        """The group of tokens at these positions of the call, with these adapters (owners)."""
        first, last = positions[0], positions[-1]
        tokens: slice | Tensor = slice(first, last + 1)
        if len(positions) < last + 1 - first:
            tokens = torch.tensor(positions, device=device)
        if len(names) == 1:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return cls(tokens, names, torch.zeros((), dtype=torch.int64, device=device), nothing, nothing)
        places = torch.tensor([names.index(name) for name in owners])
        is_own = places == torch.arange(len(names))[:, None]
        # number of each token among the tokens of its adapter
        turns = (is_own.cumsum(1) - 1)[places, torch.arange(len(owners))]
        num_slots = int(turns.max()) + 1
        slots = places * num_slots + turns
        sources = torch.full((len(names) * num_slots,), first)
        sources[slots] = torch.tensor(positions)
        return cls(tokens, names, places.to(device), sources.to(device), slots.to(device))

    def put(self, y: Tensor, own: Tensor) -> None:
        """Write what has become of own = y[tokens] back into y; neighbouring tokens have shared its memory."""
        if isinstance(self.tokens, Tensor):
            y[self.tokens] = own


class Selection:
    """The groups of a call's tokens that use an adapter; tokens outside of the groups use the base model."""

    def __init__(self) -> None:
        self.groups: tuple[Group, ...] = ()
        self._recent: list[Names] = []

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
            elif run[1]:
                runs.append([run])
        groups, start = [], 0
        for members in runs:
            owners = [name for name, length in members for _ in range(length)]
            used = [(start + i, name) for i, name in enumerate(owners) if name is not None]
            if used:
                positions, own = zip(*used, strict=True)
                groups.append(Group.of(self._set_for(set(own)), own, positions, device))
            start += len(owners)
        self.groups = tuple(groups)

    def forget_sets(self) -> None:
        """Use no set again that was used before; to be called when an adapter has been removed."""
        self._recent.clear()

    def _set_for(self, names: set[str]) -> Names:
        """The names, sorted, or a recent set that contains them and not many others.

        Layers need not stack tensors anew whenever a row leaves, and when another one comes soon after.
        """
        found = tuple(sorted(names))
        if len(found) == 1:
            return found
        found = next((recent for recent in self._recent if names <= {*recent} and len(recent) <= 2 * len(names)), found)
        self._recent = [found, *(recent for recent in self._recent if recent != found)][:MOST_SETS]
        return found

    def clear(self) -> None:
        """Let all tokens use the base model."""
        self.groups = ()
