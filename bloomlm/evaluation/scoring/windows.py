"""Windows of tokens with labels, which are the tokens that the last positions must predict, and what scores them.

    tokens   t0 t1 t2 t3      what the model sees
    labels         t3 t4      what positions 2 and 3 must predict: the labels of the LAST positions

Shapes: T tokens of a window.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from bloomlm.errors import ConfigError
from bloomlm.evaluation.scoring.batches import BatchLimit, join_shares
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

M = TypeVar("M")

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens that the model sees, and the labels of the last of them."""

    tokens: Tokens
    """[T] ids, at least one."""
    labels: Tokens
    """[at most T] ids that the last positions must predict; IGNORE_INDEX where a position is not scored."""

    @property
    def num_scored(self) -> int:
        """Number of positions with a label."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """The score of one window, summed over its positions with a label."""

    log_prob: float
    """Sum of the labels' log-probabilities, in nats."""
    num_scored: int
    num_likeliest: int
    """Number of positions whose likeliest token is the label."""

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would generate all labels."""
        return self.num_likeliest == self.num_scored


def continuation_window(
    context: Sequence[int], continuation: Sequence[int], max_length: int | None = None
) -> tuple[Window, bool]:
    """A window that scores a continuation of a context.

    Args:
        context: at least one id.
        continuation: at least one id.
        max_length: most tokens that the model may see; a longer context is cut at its beginning. None: no limit.

    Returns:
        The window, and whether its context was cut.
    """
    tokens = np.array([*context, *continuation], dtype=np.int64)
    num_seen = len(tokens) - 1 if max_length is None else min(max_length, len(tokens) - 1)
    seen = tokens[-1 - num_seen : -1]
    return Window(seen, tokens[-min(len(continuation), num_seen) :]), num_seen < len(tokens) - 1


def continuation_windows(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], max_length: int
) -> tuple[list[Window], int]:
    """A window for each (context, continuation), and how many contexts were cut; see continuation_window."""
    found = [continuation_window(context, continuation, max_length) for context, continuation in pairs]
    return [window for window, _ in found], sum(is_cut for _, is_cut in found)


_UNSCORED = WindowScore(log_prob=0.0, num_scored=0, num_likeliest=0)


class WindowScorer(ABC, Generic[M]):
    """Scores windows in batches, which become smaller when memory runs out.

    Args:
        model: to score with.
        max_batch_tokens: most tokens of a batch; a longer window is computed alone.
        mesh: the ranks; each copy of the model scores its share.
    """

    def __init__(self, model: M, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> None:
        self._model = model
        self._mesh = mesh
        self._limit = BatchLimit(
            size=max_batch_tokens, unit="tokens", single="window of {size} tokens", advice="--seq_length", mesh=mesh
        )
        self.num_computed_tokens = 0
        """Tokens that this copy's blocks have computed so far."""

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of a batch; it becomes smaller when memory runs out."""
        return self._limit.size

    @abstractmethod
    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        """Score this copy's share of the windows with these numbers, all of which have a label."""

    def score(self, windows: Sequence[Window], done: Collection[int] = ()) -> Iterator[dict[int, WindowScore]]:
        """Score this copy's share of the windows, batch by batch.

        Args:
            windows: in any order, the same on all ranks.
            done: numbers of windows to leave out, the same on all ranks.

        Yields:
            Number of the window -> its score.

        Raises:
            ConfigError: a single window does not fit into memory, or a batch does not on ranks that share a model; or a
                log-probability is infinite or NaN.
        """
        todo = sorted(set(range(len(windows))) - set(done))
        scored = [number for number in todo if windows[number].num_scored]
        if len(scored) < len(todo) and self._mesh.is_main:
            yield dict.fromkeys(sorted(set(todo) - set(scored)), _UNSCORED)
        for batch in self._score_own(windows, scored):
            _check_finite(batch)
            yield batch

    def score_all(
        self, windows: Sequence[Window], on_progress: Callable[[int], None] = lambda num_scored: None
    ) -> list[WindowScore]:
        """Score all windows on all copies of the model, and return the scores in the order of the windows.

        Args:
            windows: in any order, the same on all ranks.
            on_progress: called after every batch with the number of windows in it.
        """
        own: dict[int, WindowScore] = {}
        for batch in self.score(windows):
            own |= batch
            on_progress(len(batch))
        results = join_shares(own, self._mesh)
        return [results[number] for number in range(len(windows))]


def _check_finite(scores: Mapping[int, WindowScore]) -> None:
    for number, score in scores.items():
        if not math.isfinite(score.log_prob):
            raise ConfigError(
                f"the model gives no probabilities (log-probability {score.log_prob}) in window {number}: its weights "
                "are damaged, or too large for float16; try --dtype float32 or bfloat16"
            )
