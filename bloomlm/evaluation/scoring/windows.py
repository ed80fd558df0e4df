"""Windows of tokens, with labels: the tokens that the last positions of a window must predict.

    tokens   t0 t1 t2 t3      what the model sees
    labels         t3 t4      what positions 2 and 3 must predict: the labels of the LAST positions

Shapes: T tokens of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens, and the labels of the last of them."""

    tokens: Tokens
    """[T] ids, at least one."""
    labels: Tokens
    """At most T ids, for the last positions; IGNORE_INDEX where a position is not scored."""

    @property
    def num_scored(self) -> int:
        """Positions that have a label."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """The result of one window, summed over its scored positions."""

    log_prob: float
    """Sum of the natural logarithms of the labels' probabilities."""
    num_scored: int
    num_likeliest: int
    """Scored positions whose likeliest token is the label."""

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have given all labels."""
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
