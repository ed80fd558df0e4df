"""Raw text from one or several sources, mixed by weight, in an order that is computed and needs no memory.

An epoch has as many windows as all sources together. Each source gets a share of them, so that its tokens are the
fraction of the epoch's tokens that its weight is of all weights. It goes through its own windows in a new random order
as often as it takes: a source of little weight continues in the next epoch where it stopped, and one of much weight
repeats no window before all have had their turn.

Every place of an epoch is computed from seed, epoch and place alone. So a run resumes anywhere without reading the
places before, and the order is the same for any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from bloomlm.data.example import Example, divide
from bloomlm.data.loader import TokenBudget
from bloomlm.data.permutation import Permutation
from bloomlm.data.token_plan import Indices
from bloomlm.data.windows import TextWindows
from bloomlm.errors import ConfigError, counted


@dataclass(frozen=True, kw_only=True)
class Source:
    """Windows of one source, at least one."""

    name: str
    windows: TextWindows
    weight: float = 1.0
    """Above 0; only ratios between sources count."""
    language: str | None = None


class Mixture:
    """The windows of all sources by index, source after source.

    Args:
        sources: at least one.
        max_length: most positions of a window.
        name: where the texts come from, for messages.
    """

    unit = "windows"

    def __init__(self, sources: Sequence[Source], max_length: int, *, name: str) -> None:
        self.sources = tuple(sources)
        self.max_length = max_length
        self.name = name
        self._starts = np.cumsum([0, *(len(source.windows) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[number].windows[index - int(self._starts[number])]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all windows."""
        return sum(source.windows.num_tokens for source in self.sources)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learned: all but the first of each document."""
        return sum(source.windows.num_supervised_tokens for source in self.sources)

    def windows_per_epoch(self) -> tuple[int, ...]:
        """How many windows of an epoch come from each source; their sum is the number of all windows.

        Raises:
            ConfigError: a weight is so small that its source has no window.
        """
        # windows per token times the share of the tokens
        shares = np.array([s.weight * len(s.windows) / s.windows.num_supervised_tokens for s in self.sources])
        exact = shares / shares.sum() * len(self)
        counts = np.floor(exact).astype(np.int64)
        order = np.argsort(counts - exact, kind="stable")  # those that lost most by rounding come first
        counts[order[: len(self) - int(counts.sum())]] += 1
        for source, count in zip(self.sources, counts, strict=True):
            if count == 0:
                raise ConfigError(
                    f"source {source.name} of weight {source.weight:g}: that is less than one window of the "
                    f"{len(self):,} of an epoch; raise its weight, or leave it out"
                )
        return tuple(counts.tolist())

    def windows_per_batch(self, budget: TokenBudget) -> int:
        """How many windows a batch of a number of tokens holds for certain.

        Raises:
            ConfigError: not even one.
        """
        if budget.max_tokens < self.max_length:
            raise ConfigError(
                f"--max_tokens_per_batch {budget.max_tokens} is less than a window of raw text, --max_length "
                f"{self.max_length}; raise the first or lower the second"
            )
        return budget.max_tokens // self.max_length

    def describe(self) -> Iterator[str]:
        """A line about each source of several: how often an epoch passes through it."""
        if len(self.sources) > 1:
            for source, count in zip(self.sources, self.windows_per_epoch(), strict=True):
                yield (
                    f"  {source.name}: weight {source.weight:g}, {counted(len(source.windows), 'windows')}, "
                    f"{counted(source.windows.num_tokens, 'tokens')}, {count / len(source.windows):.2f} passes an epoch"
                )

    def hold_out(self, most: int) -> "tuple[Mixture, Mixture]":
        """The sources without their last windows, and these; a source of one window keeps it."""
        kept, held_out = [], []
        for source in self.sources:
            if len(source.windows) == 1:
                kept.append(source)
                continue
            first, last = divide(source.windows, most)
            kept.append(replace(source, windows=first))
            held_out.append(replace(source, windows=last))
        return Mixture(kept, self.max_length, name=self.name), Mixture(held_out, self.max_length, name=self.name)

    @property
    def lengths(self) -> Indices:
        """Number of tokens of each window, in memory."""
        return np.concatenate([source.windows.lengths for source in self.sources])


class MixtureOrder:
    """The order of windows in each epoch; see the top of this file.

    Args:
        mixture: the sources.
        seed: at least 0.

    Raises:
        ConfigError: a weight is too small.
    """

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._seed = seed
        self._sizes = [len(source.windows) for source in mixture.sources]
        self._digests = [source.windows.digest for source in mixture.sources]
        self._first = np.cumsum([0, *self._sizes])
        self._counts = mixture.windows_per_epoch()
        self._ends = np.cumsum(self._counts)

    @property
    def identity(self) -> str:
        """For each source, how many of its windows an epoch has, and a digest of its texts."""
        sources = zip(self._counts, self._sizes, self._digests, strict=True)
        return "; ".join(f"{count} of {size} windows of {digest:08x}" for count, size, digest in sources)

    def of_epoch(self, epoch: int) -> "MixtureEpoch":
        """The windows of an epoch in their order."""
        return MixtureEpoch(self, epoch, Permutation(int(self._ends[-1]), self._seed, 0, epoch))

    def draw(self, epoch: int, slot: int) -> int:
        """The window in a slot of an epoch; the slots of a source lie side by side."""
        source = int(np.searchsorted(self._ends, slot, side="right"))
        count, size = self._counts[source], self._sizes[source]
        drawn = epoch * count + slot - int(self._ends[source]) + count
        own_pass, place = divmod(drawn, size)
        return int(self._first[source]) + _permutation(size, self._seed, 1 + source, own_pass)[place]


@dataclass(frozen=True)
class MixtureEpoch:
    """The windows of one epoch, computed when they are asked for."""

    order: MixtureOrder
    epoch: int
    slots: Permutation

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, part: slice) -> Indices:
        places = range(*part.indices(len(self)))
        return np.array([self.order.draw(self.epoch, self.slots[place]) for place in places], dtype=np.int64)


_permutation = lru_cache(maxsize=256)(Permutation)
