"""Runs a plan: scores its windows, shows how far it is, keeps what is done."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bloomlm.evaluation.copies import join_shares
from bloomlm.evaluation.evaluated import Evaluated, make_scorer
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.partial_file import PartialFile
from bloomlm.evaluation.plan import Plan, Totals
from bloomlm.evaluation.scoring.windows import WindowScore
from bloomlm.parallel.mesh import ALONE, Mesh

OnProgress = Callable[[int, Totals], None]
"""Called with the number of windows that are done and the sums over those known here."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a plan."""

    metrics: Mapping[str, Metric]
    seconds: float
    """Of this run, without loading."""
    num_computed_tokens: int
    """Tokens that went through the model in this run, through all copies of it."""
    num_windows_before: int
    """Windows that an earlier, stopped run had scored."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model, by time."""
        return self.num_computed_tokens / self.seconds if self.seconds else 0.0


def run_plan(
    model: Evaluated,
    plan: Plan,
    *,
    max_batch_tokens: int,
    partial: PartialFile | None = None,
    on_progress: OnProgress | None = None,
    mesh: Mesh = ALONE,
) -> Outcome:
    """Score a plan's windows and make its metrics of them.

    Args:
        model: to evaluate.
        plan: of a protocol.
        max_batch_tokens: tokens in memory at once; changes the speed, not the results.
        partial: holds what an earlier run scored, and gets what this one does.
        on_progress: called at the start, after every batch and at the end.
        mesh: the ranks, all of which must come here; all get the whole outcome.

    Raises:
        ConfigError: as WindowScorer.score.
        CheckpointError: the scores cannot be written.
    """
    done = {} if partial is None else partial.done
    before = {number: WindowScore(**fields) for number, fields in done.items()}
    own: dict[int, WindowScore] = {}
    totals = Totals().plus(list(before.values()))
    scorer = make_scorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)
    if on_progress is not None:
        on_progress(len(before), totals)
    started = time.perf_counter()
    for batch in scorer.score(plan.windows, done=before.keys()):
        own |= batch
        totals = totals.plus(list(batch.values()))
        if partial is not None:
            partial.add({number: dataclasses.asdict(score) for number, score in batch.items()})
        num_done = len(before) + len(own) * mesh.degrees.dp  # the other copies are about as far
        if on_progress is not None and num_done < len(plan.windows):
            on_progress(num_done, totals)
    scores = before | join_shares(own, mesh)
    if on_progress is not None:
        on_progress(len(plan.windows), Totals().plus(list(scores.values())))
    return Outcome(
        metrics=plan.metrics([scores[number] for number in range(len(plan.windows))]),
        seconds=time.perf_counter() - started,
        num_computed_tokens=sum(mesh.gather_copies(scorer.num_computed_tokens)),
        num_windows_before=len(before),
    )
