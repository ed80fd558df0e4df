"""Batches of preference data: packed like other examples, the answers of a pair one after the other.

Besides tokens and labels, a loss over whole answers needs to know which labels belong to which answer, and the answer's
log-probability under the reference model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from bloomlm.data.example import Example
from bloomlm.data.loader import Batch, collate


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedExample(Example):
    """An answer to a prompt, beside another answer to the same prompt."""

    other: Example
    """In a pair the rejected answer; for a judged answer that of another row."""
    is_desirable: bool
    """The judgement; True for the chosen answer of a pair."""
    reference: tuple[float, float]
    """Log-probabilities of the two answers under the reference model; NaN where there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerBatch(Batch):
    """Answers with their prompts; the last span of learned tokens of each is the answer."""

    spans: tuple[tuple[int, ...], ...]
    """For each answer, the number of labels in each span of learned tokens; empty if the batch has no answer."""
    reference: torch.Tensor
    """[answers] float64: their log-probabilities under the reference model."""
    is_desirable: torch.Tensor
    """[answers] bool."""
    others: "AnswerBatch | None" = None
    """For judged answers: the answers of other rows to the same prompts."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on a device."""
        return replace(
            super().to(device),
            reference=self.reference.to(device, non_blocking=True),
            is_desirable=self.is_desirable.to(device, non_blocking=True),
            others=None if self.others is None else self.others.to(device),
        )


def collate_pairs(pairs: Sequence[ComparedExample]) -> AnswerBatch:
    """Pack pairs, each the chosen answer and then the rejected one; as in `collate`, there may be none."""
    return _collate(
        [answer for pair in pairs for answer in (pair, pair.other)],
        reference=[score for pair in pairs for score in pair.reference],
        is_desirable=[True, False] * len(pairs),
    )


def collate_judged(answers: Sequence[ComparedExample]) -> AnswerBatch:
    """Pack judged answers, and in a second batch the other answers to their prompts; as in `collate`, without any."""
    is_desirable = [answer.is_desirable for answer in answers]
    others = _collate([answer.other for answer in answers], [answer.reference[1] for answer in answers], is_desirable)
    own = _collate(answers, [answer.reference[0] for answer in answers], is_desirable)
    return replace(own, others=others)


def collate_answers(answers: Sequence[Example]) -> AnswerBatch:
    """Pack answers whose log-probabilities are to be computed."""
    return _collate(answers, [float("nan")] * len(answers), [True] * len(answers))


def _collate(answers: Sequence[Example], reference: list[float], is_desirable: list[bool]) -> AnswerBatch:
    return AnswerBatch(
        **vars(collate(answers)),
        # nothing predicts the first token, so a span that begins with it has a label less
        spans=tuple(tuple(stop - max(start, 1) for start, stop in answer.learned) for answer in answers),
        reference=torch.tensor(reference, dtype=torch.float64),
        is_desirable=torch.tensor(is_desirable, dtype=torch.bool),
    )
