"""What all scorers of windows share: which windows are scored, and results batch by batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from bloomlm.errors import ConfigError
from bloomlm.evaluation.scoring.batches import BatchLimit, join_shares
from bloomlm.evaluation.scoring.windows import Window, WindowScore
from bloomlm.parallel.mesh import ALONE, Mesh

_UNSCORED = WindowScore(log_prob=0.0, num_scored=0, num_likeliest=0)


class WindowScorer(ABC):
    """Scores windows in batches of at most max_batch_tokens; batches become smaller once memory has run out.

    Args:
        max_batch_tokens: tokens in memory at once; a single longer window is computed alone.
        mesh: the ranks; each copy of the model scores its share.
    """

    def __init__(self, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> None:
        self._mesh = mesh
        self._limit = BatchLimit(
            size=max_batch_tokens, unit="tokens", single="window of {size} tokens", advice="--seq_length", mesh=mesh
        )
        self.num_computed_tokens = 0
        """Tokens that this copy's blocks have computed so far."""

    @property
    def max_batch_tokens(self) -> int:
        """Tokens in memory at once; fewer than at first once memory has run out."""
        return self._limit.size

    @abstractmethod
    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        """Score this copy's share of the windows of these numbers, each of which has something to score."""

    def score(self, windows: Sequence[Window], done: Collection[int] = ()) -> Iterator[dict[int, WindowScore]]:
        """Score this copy's share of the windows, batch by batch.

        Args:
            windows: in any order, the same on all ranks.
            done: numbers of windows that need no scoring any more, the same on all ranks.

        Yields:
            Number of the window -> its score.

        Raises:
            ConfigError: a single window does not fit into memory, or a batch on ranks that share a model; or a
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
        """Score all windows on all copies, and return the scores in the order of the windows.

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
