"""Scores windows with a model that shows the logits of one position at a time, as exported programs do.

The context up to the first scored position is read in one prefill, then each of the window's own tokens is forced
through decode_step, and every step shows one more scored position. So what is evaluated is what writes texts: the same
two functions, in every format. It takes a decode_step for each scored token; a batch of windows shares it.

    tokens   t0 t1 t2 t3      t0 t1 t2 in a prefill, which shows what follows t2; t3 in a decode_step
    labels         t3 t4

Shapes: B windows, V vocabulary.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bloomlm.errors import ConfigError
from bloomlm.evaluation.copies import free_memory, is_out_of_memory, own_share
from bloomlm.evaluation.scoring.window_scorer import WindowScorer
from bloomlm.evaluation.scoring.windows import Tokens, Window, WindowScore
from bloomlm.generation.loop import LanguageModel
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX

_LOG = logging.getLogger(__name__)


class StepScorer(WindowScorer):
    """Scores windows through prefill and decode_step.

    Args:
        model: what computes the logits.
        max_batch_tokens: tokens in memory at once; a single longer window is computed alone.
        mesh: the ranks; each takes its share with a model of its own.
    """

    def __init__(self, model: LanguageModel, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, mesh=mesh)
        self._model = model

    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        forced = {number: _Forced.of(windows[number]) for number in numbers}
        # windows of a batch shall take about as many steps
        order = sorted(numbers, key=lambda number: (len(forced[number].tokens), forced[number].size), reverse=True)
        waiting = own_share(order, self._mesh)
        while waiting:
            count = self._batch_size(forced[number].size for number in waiting)
            batch = [forced[number] for number in waiting[:count]]
            try:
                results = self._score_batch(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(batch, error)
                continue
            numbers_done = waiting[:count]
            del waiting[:count]
            yield dict(zip(numbers_done, results, strict=True))

    def _batch_size(self, sizes: Iterable[int]) -> int:
        """How many of the first windows, by their numbers of tokens, go together: all are padded to the longest."""
        count = longest = 0
        for size in sizes:
            longest = max(longest, size)
            if count and longest * (count + 1) > self.max_batch_tokens:
                break
            count += 1
        return count

    def _halve(self, batch: Sequence["_Forced"], error: Exception) -> None:
        """Make later batches half as large as one that did not fit."""
        size = len(batch) * max(window.size for window in batch)
        free_memory(f"a batch of {size} tokens", self._mesh, error)
        if len(batch) == 1:
            raise ConfigError(
                f"memory ran out on a single window of {size} tokens; give a smaller --seq_length ({error})"
            ) from error
        self.max_batch_tokens = size // 2
        _LOG.warning("memory ran out on a batch of %d tokens; going on with %d", size, self.max_batch_tokens)

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence["_Forced"]) -> list[WindowScore]:
        """Score windows together, those with the most steps first."""
        num_steps = [len(window.tokens) for window in batch]
        tokens = torch.zeros(len(batch), num_steps[0], dtype=torch.int64)
        labels = torch.full((len(batch), num_steps[0] + 1), IGNORE_INDEX)
        for row, window in enumerate(batch):
            tokens[row, : num_steps[row]] = torch.from_numpy(window.tokens)
            labels[row, : num_steps[row] + 1] = torch.from_numpy(window.labels)
        decoding, logits = self._model.prefill([window.prompt.tolist() for window in batch], num_steps[0])
        self.num_computed_tokens += sum(len(window.prompt) for window in batch)
        log_probs, num_likeliest = torch.zeros(len(batch), dtype=torch.float64), torch.zeros(len(batch))
        num_rows = len(batch)
        for step in range(num_steps[0] + 1):
            step_log_probs, is_likeliest = _score_labels(logits, labels[:num_rows, step])
            log_probs[:num_rows] += step_log_probs
            num_likeliest[:num_rows] += is_likeliest
            if step == num_steps[0]:
                break
            num_going = sum(count > step for count in num_steps)
            if num_going <= num_rows // 2:  # those that ended leave when they are half
                num_rows = num_going
                decoding.reorder(torch.arange(num_rows))
            logits = decoding.decode_step(tokens[:num_rows, step])
            self.num_computed_tokens += num_rows
        return [
            WindowScore(log_prob=float(log_prob), num_scored=window.num_scored, num_likeliest=int(hits))
            for window, log_prob, hits in zip(batch, log_probs, num_likeliest, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Forced:
    """A window as prefill and decode_step take it; what stands behind its last scored position is left out."""

    prompt: Tokens
    """Up to the first scored position."""
    tokens: Tokens
    """Behind it, one for each step."""
    labels: Tokens
    """What the prefill and then every step must predict, or IGNORE_INDEX."""

    @classmethod
    def of(cls, window: Window) -> "_Forced":
        """Cut a window that has something to score."""
        scored = np.flatnonzero(window.labels != IGNORE_INDEX)
        first, last = (int(place) + len(window.tokens) - len(window.labels) for place in scored[[0, -1]])
        return cls(
            window.tokens[: first + 1], window.tokens[first + 1 : last + 1], window.labels[scored[0] : scored[-1] + 1]
        )

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_scored(self) -> int:
        """Positions that have a label."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


def _score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] logits, [B] labels -> [B] log-probabilities in fp64 and whether it is the likeliest; 0 without a label."""
    has_label = labels != IGNORE_INDEX
    columns = labels.masked_fill(~has_label, 0)
    log_probs = logits.float().log_softmax(-1).gather(1, columns[:, None]).squeeze(1).double()
    return log_probs.masked_fill(~has_label, 0.0), (logits.max(-1).indices == columns) & has_label
