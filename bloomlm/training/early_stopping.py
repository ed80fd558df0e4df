"""Early stopping: the end of a run whose evaluations no longer improve, as in transformers' EarlyStoppingCallback."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from bloomlm.training.results import Entry


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When a run ends before its last step."""

    metric: str
    """Name of the metric in the log."""
    greater_is_better: bool
    """Whether a greater value is better."""
    patience: int
    """Number of evaluations in a row without improvement after which the run ends."""
    threshold: float
    """A value improves on the best one before it if it is better by more than this."""

    def is_due(self, log: Iterable[Entry]) -> bool:
        """Whether the run is over, by the evaluations among the entries of its log.

        Every value is compared with the best one before it, even if that was better by less than the threshold. A value
        that is no number (None in the log) does not improve.
        """
        best, without_improvement = -math.inf, 0
        for value in (entry[self.metric] for entry in log if self.metric in entry):
            score = math.nan if value is None else float(value) if self.greater_is_better else -float(value)
            improves = score - best > self.threshold
            without_improvement = 0 if improves else without_improvement + 1
            best = max(best, score)
        return without_improvement >= self.patience

    def describe(self) -> str:
        """Why the run ended."""
        by = f" by more than {self.threshold:g}" if self.threshold else ""
        return f"{self.metric} did not improve{by} in the last {self.patience} evaluations"
