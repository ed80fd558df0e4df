"""Direct preference optimisation: https://arxiv.org/abs/2305.18290, equation 7.

With rewards r = beta (log p - log p_reference), the loss of a pair is -log sigmoid(r_chosen - r_rejected). With label
smoothing s ("conservative DPO", https://ericmitchell.ai/cdpo.pdf, equation 3), a pair is the wrong way round with
probability s: -(1 - s) log sigmoid(m) - s log sigmoid(-m) for the margin m.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bloomlm.data.answer_batch import AnswerBatch
from bloomlm.training.objectives.preference import REWARDS, AnswerScores, PairObjective, paired, reward_sums


@dataclass(frozen=True, kw_only=True)
class Dpo(PairObjective):
    """Make the chosen answer likelier than the rejected one, compared with the reference model."""

    label_smoothing: float = 0.0
    """Probability that a pair is the wrong way round."""

    metric_names: ClassVar[tuple[str, ...]] = tuple(f"eval_{name}" for name in ("loss", *REWARDS, "rewards_accuracy"))

    def describe(self) -> str:
        """Its name and options."""
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"DPO, beta {self.beta:g}{smoothing}"

    def loss_of(
        self, scores: AnswerScores, batch: AnswerBatch, step_sums: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the pairs' losses, divided by the pairs of the step."""
        rewards = self.beta * paired(scores.answers - batch.reference)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1.0 - self.label_smoothing) * F.logsigmoid(margins)
        if self.label_smoothing:
            losses = losses - self.label_smoothing * F.logsigmoid(-margins)
        return losses.sum() / step_sums[0], reward_sums(rewards)
