"""Batches of packed examples, in an order that depends on seed and epoch alone.

An example of n tokens fills n - 1 positions: all of its tokens except the last, each labelled with the next token.
Nothing is predicted from the closing </s>, so the model does not read it:

    example  src0 src1 tgt0 tgt1 </s>
    tokens   src0 src1 tgt0 tgt1
    labels   -100 tgt0 tgt1 </s>

A batch holds a number of examples, or as many as fit into a budget of tokens (TokenPlan).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from bloomlm.data.example import Example, Examples
from bloomlm.data.token_plan import Indices, TokenPlan
from bloomlm.errors import ConfigError, TrainingError
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX


@dataclass(frozen=True)
class TokenBudget:
    """The size of a batch in tokens."""

    max_tokens: int
    """Maximum number of tokens; an example that is longer forms a batch alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples one after another, without padding: N positions."""

    tokens: torch.Tensor
    """[N] int64: token ids."""
    labels: torch.Tensor
    """[N] int64: the token that each position must predict, or IGNORE_INDEX."""
    lengths: tuple[int, ...]
    """Number of positions of each document; their sum is N."""
    num_supervised_tokens: int
    """Number of positions that have a label."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


class Batches(Protocol):
    """What training reads: a BatchLoader, or an object in its place."""

    def __len__(self) -> int:
        """Number of batches of a whole epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; state_dict counts a batch as used as soon as it is yielded."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        ...


def collate(examples: Sequence[Example]) -> Batch:
    """Pack examples, whose documents have at least two tokens each, into one batch in their order.

    Without examples, the batch has a token and no label: for a rank that has no examples left but must take part in
    every exchange.
    """
    if not examples:
        return Batch(
            tokens=torch.tensor([0]), labels=torch.tensor([IGNORE_INDEX]), lengths=(1,), num_supervised_tokens=0
        )
    tokens, labels = list[npt.NDArray[np.int32]](), list[npt.NDArray[np.int64]]()
    for example in examples:
        learned = np.full(len(example.tokens), IGNORE_INDEX, dtype=np.int64)
        for start, stop in example.learned:
            learned[start:stop] = example.tokens[start:stop]
        for start, stop in pairwise((*example.document_starts, len(example.tokens))):
            # a position predicts the token after it, and nothing predicts the first
            tokens.append(example.tokens[start : stop - 1])
            labels.append(learned[start + 1 : stop])
    lengths = tuple(map(len, tokens))
    assert min(lengths) > 0
    joined = np.concatenate(labels)
    return Batch(
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        labels=torch.from_numpy(joined),
        lengths=lengths,
        num_supervised_tokens=int((joined != IGNORE_INDEX).sum()),
    )


class IndexSequence(Protocol):
    """Indices of examples, which need not be in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Indices: ...


class EpochOrder(Protocol):
    """An order of examples that is computed when it is asked for."""

    @property
    def identity(self) -> str:
        """Differs for another order; a run resumes only with the same."""
        ...

    def of_epoch(self, epoch: int) -> IndexSequence:
        """The examples of an epoch, numbered from 0, in their order; every epoch has as many as there are examples."""
        ...


class BatchLoader:
    """Goes through examples epoch by epoch; each iteration continues where the last one stopped.

    `for batch in loader` yields the rest of the current epoch. A loader with the state_dict of another loader yields
    exactly the batches that the other one would have yielded next.

    Args:
        examples: at least one example.
        batch_size: number of examples of a batch (the last batch of an epoch may hold fewer), or a budget of tokens.
        shuffle: whether each epoch has a new order; otherwise the examples keep theirs.
        seed: seed of the shuffle.
        dp_degree: number of data-parallel ranks. Each of them gets one of this many successive batches. If an epoch
            ends with fewer, the last ranks get one token without a label. Position and length count for all ranks.
        dp_rank: number of this rank.
        collate: makes a batch of examples; without examples, one that changes nothing.
        order: the order of the examples in each epoch; None: as shuffle and seed say.

    Raises:
        ConfigError: batch_size or the number of examples is below 1, or seed is negative.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int | TokenBudget,
        *,
        shuffle: bool,
        seed: int = 0,
        dp_degree: int = 1,
        dp_rank: int = 0,
        collate: Callable[[Sequence[Example]], Batch] = collate,
        order: EpochOrder | None = None,
    ) -> None:
        budget = batch_size.max_tokens if isinstance(batch_size, TokenBudget) else batch_size
        if budget < 1 or len(examples) < 1 or seed < 0:
            raise ConfigError(
                f"batch size {batch_size}, {len(examples)} examples, seed {seed}: expected a batch size of at least 1, "
                "at least 1 example, and a seed of at least 0"
            )
        self._examples = examples
        self._batch_size = batch_size
        self._plan: TokenPlan | None = None
        if isinstance(batch_size, TokenBudget):
            # a batch has one position less than an example has tokens
            self._plan = TokenPlan(np.asarray(examples.lengths) - 1, batch_size.max_tokens)
        self._shuffle = shuffle
        self._order = order
        self._seed = seed
        self._dp_degree, self._dp_rank = dp_degree, dp_rank
        self._collate = collate
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        """Number of batches of a whole epoch, for each rank."""
        if self._plan is not None:
            return -(-len(self._plan) // self._dp_degree)
        assert isinstance(self._batch_size, int)
        return -(-len(self._examples) // (self._batch_size * self._dp_degree))

    @property
    def epoch(self) -> int:
        """Number, from 0, of the epoch that the next batch belongs to."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        """The remaining batches of the current epoch."""
        epoch = self._epoch
        order, ends = self._epoch_plan(epoch)
        while self._epoch == epoch:
            position, chosen = self._position, order[:0]
            for dp_rank in range(self._dp_degree):
                stop = min(self._end_of_batch(position, ends), len(order))
                chosen = order[position:stop] if dp_rank == self._dp_rank else chosen
                position = stop
            batch = self._collate([self._examples[int(index)] for index in chosen])
            # moved before the batch is yielded, so that a state saved meanwhile does not repeat it
            self._position = position
            if self._position >= len(order):
                self._epoch, self._position = epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position (number of its examples that were yielded), and what must be the same when a run resumes."""
        return {"epoch": self._epoch, "position": self._position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader stopped. The number of examples of a batch may differ.

        Raises:
            TrainingError: the other loader had another number of examples, seed, shuffle or budget of tokens.
        """
        for name, mine in self._fixed().items():
            if state.get(name) != mine:
                raise TrainingError(
                    f"the saved run had {name} {state.get(name)}, this one has {mine}, so it cannot continue it. Use "
                    "the same data and seed, or a new output_dir"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _fixed(self) -> dict[str, Any]:
        max_tokens = self._batch_size.max_tokens if isinstance(self._batch_size, TokenBudget) else None
        return {
            "num_examples": len(self._examples),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "max_tokens": max_tokens,
            **({} if self._order is None else {"order": self._order.identity}),
        }

    def _end_of_batch(self, position: int, ends: Indices) -> int:
        """The end of the batch that starts at a position."""
        if isinstance(self._batch_size, TokenBudget):
            later = np.searchsorted(ends, position, side="right")
            return int(ends[later]) if later < len(ends) else position
        return position + self._batch_size

    def _epoch_plan(self, epoch: int) -> tuple[IndexSequence, Indices]:
        """The examples of an epoch in their order, and the end of each batch of a TokenPlan."""
        if self._order is not None:
            return self._order.of_epoch(epoch), np.arange(0)
        # sorts raw 64-bit draws, because numpy may change Generator.permutation from version to version
        generator = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))

        def shuffled(count: int) -> Indices:
            return np.argsort(generator.random_raw(count), kind="stable") if self._shuffle else np.arange(count)

        order = shuffled(len(self._examples))
        if self._plan is None:
            return order, np.arange(0)
        return self._plan.deal(order, shuffled(len(self._plan)))
