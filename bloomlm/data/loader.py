"""Batches of packed examples, in an order that depends on (seed, epoch) alone.

An example of n tokens fills n - 1 positions: all of its tokens but the last, each labelled with the token after it.
Nothing is predicted from the closing </s>, so the model does not read it.

    tokens   src0 src1 tgt0 tgt1         of the example   src0 src1 tgt0 tgt1 </s>
    labels   -100 tgt0 tgt1 </s>
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bloomlm.data.examples import Example
from bloomlm.data.packing import TokenBudget, TokenPlan
from bloomlm.errors import ConfigError, TrainingError
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

# N packed tokens of a batch.


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples one after another, without padding."""

    tokens: torch.Tensor
    """Token ids [N], int64."""

    labels: torch.Tensor
    """[N], int64: the token that each position must predict, or IGNORE_INDEX."""

    lengths: tuple[int, ...]
    """Positions of each example; they add up to N."""

    num_supervised_tokens: int
    """Positions that have a label."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on a device."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            lengths=self.lengths,
            num_supervised_tokens=self.num_supervised_tokens,
        )


class Examples(Protocol):
    """A source of examples for a loader, such as an ExampleSet or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    @property
    def lengths(self) -> Sequence[int] | npt.NDArray[np.int64]:
        """Tokens of each example, which a loader with a TokenBudget needs."""
        ...


class Batches(Protocol):
    """What training reads: a BatchLoader, or something in its place."""

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch; a batch counts as used in state_dict as soon as it is handed out."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position."""
        ...


def collate(examples: Sequence[Example]) -> Batch:
    """Pack examples into one batch, in their order.

    Args:
        examples: each of at least two tokens.
    """
    lengths = tuple(len(example.tokens) - 1 for example in examples)
    assert min(lengths) > 0
    tokens = np.empty(sum(lengths), dtype=np.int64)
    labels = np.full(sum(lengths), IGNORE_INDEX, dtype=np.int64)
    start, num_supervised_tokens = 0, 0
    for example, length in zip(examples, lengths, strict=True):
        first = max(example.num_source_tokens - 1, 0)  # the last source token predicts the first target token
        tokens[start : start + length] = example.tokens[:-1]
        labels[start + first : start + length] = example.tokens[first + 1 :]
        start += length
        num_supervised_tokens += length - first
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        lengths=lengths,
        num_supervised_tokens=num_supervised_tokens,
    )


class BatchLoader:
    """Goes through examples epoch by epoch; each iteration continues where the last one stopped.

    `for batch in loader` yields the rest of the current epoch. A loader with the state_dict of another one yields
    exactly the batches that the other would have yielded next.

    Args:
        examples: what to learn, at least one.
        batch_size: examples in a batch (the last batch of an epoch may hold fewer), or a budget of tokens.
        shuffle: use a new order in each epoch, instead of that of the examples.
        seed: of the shuffle.
        dp_degree: data-parallel ranks, which take turns: each gets one of this many successive batches. If an epoch
            ends with fewer, the last ranks get one token without a label. Position and length count for all ranks.
        dp_rank: which of them this is.

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
    ) -> None:
        budget = batch_size.max_tokens if isinstance(batch_size, TokenBudget) else batch_size
        if budget < 1 or len(examples) < 1 or seed < 0:
            raise ConfigError(
                f"batch size {batch_size}, {len(examples)} examples, seed {seed}: expected at least 1, at least 1, "
                "and a seed that is not negative"
            )
        self._examples = examples
        self._batch_size = batch_size
        self._plan: TokenPlan | None = None
        if isinstance(batch_size, TokenBudget):
            # a batch has one position less than an example has tokens
            self._plan = TokenPlan(np.asarray(examples.lengths) - 1, batch_size.max_tokens)
        self._shuffle = shuffle
        self._seed = seed
        self._dp_degree, self._dp_rank = dp_degree, dp_rank
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, for each rank."""
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
            batch = collate([self._examples[int(index)] for index in chosen]) if len(chosen) else self._idle_batch()
            # the position moves on before the batch is handed out, so that a state saved meanwhile points behind it
            self._position = position
            if self._position >= len(order):
                self._epoch, self._position = epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position (examples of it that were handed out), and what must not change when a run resumes."""
        return {"epoch": self._epoch, "position": self._position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader stood. The batch size may differ, because the position counts examples.

        Raises:
            TrainingError: the other loader had other examples, another seed or another shuffle.
        """
        for name, mine in self._fixed().items():
            if state.get(name) != mine:
                raise TrainingError(
                    f"the saved run had {name} {state.get(name)}, this one has {mine}, so it cannot go on where that "
                    "stopped. Use the same data and seed, or start in a new output_dir"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _fixed(self) -> dict[str, Any]:
        max_tokens = self._batch_size.max_tokens if isinstance(self._batch_size, TokenBudget) else None
        fixed = {"num_examples": len(self._examples), "seed": self._seed, "shuffle": self._shuffle}
        return {**fixed, "max_tokens": max_tokens}

    def _end_of_batch(self, position: int, ends: npt.NDArray[np.int64]) -> int:
        """Where the batch that starts at a position ends."""
        if isinstance(self._batch_size, TokenBudget):
            later = np.searchsorted(ends, position, side="right")
            return int(ends[later]) if later < len(ends) else position
        return position + self._batch_size

    def _idle_batch(self) -> Batch:
        """A batch for a rank that has nothing to learn while others do, which wait for it in every exchange."""
        token = torch.from_numpy(self._examples[0].tokens[:1].astype(np.int64))
        return Batch(tokens=token, labels=torch.tensor([IGNORE_INDEX]), lengths=(1,), num_supervised_tokens=0)

    def _epoch_plan(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The examples of an epoch in their order, and where each batch of a TokenPlan ends."""
        # raw 64-bit draws are sorted, because numpy may change Generator.permutation from version to version
        generator = np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))

        def shuffled(count: int) -> npt.NDArray[np.int64]:
            return np.argsort(generator.random_raw(count), kind="stable") if self._shuffle else np.arange(count)

        order = shuffled(len(self._examples))
        if self._plan is None:
            return order, np.arange(0)
        return self._plan.deal(order, shuffled(len(self._plan)))
