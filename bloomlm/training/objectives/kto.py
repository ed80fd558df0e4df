"""Kahneman-Tversky optimisation: https://arxiv.org/abs/2402.01306, equation 8.

With r = log p - log p_reference of an answer and z = max(0, mean of r over answers of other rows to the same prompts),
which estimates the divergence of the model from its reference and gets no gradient, the loss of a desirable answer is
desirable_weight (1 - sigmoid(beta (r - z))), and that of an undesirable one is undesirable_weight
(1 - sigmoid(beta (z - r))). z is estimated from all answers of a step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bloomlm.data.answer_batch import AnswerBatch, ComparedExample, collate_judged
from bloomlm.data.preferences import ComparedSet, JudgedAnswers
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.decoding import eval_mode
from bloomlm.parallel.data_parallel import reshard
from bloomlm.training.objectives.preference import REWARDS, AnswerScores, PreferenceObjective, score_answers
from bloomlm.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Kto(PreferenceObjective):
    """Make desirable answers likelier and undesirable ones less likely, compared with the reference model."""

    desirable_weight: float = 1.0
    """Factor of the losses of desirable answers."""
    undesirable_weight: float = 1.0
    """Factor of the losses of undesirable answers."""

    compared_set: ClassVar[type[ComparedSet] | None] = JudgedAnswers
    scored_per_example: ClassVar[int] = 1
    loss_unit: ClassVar[str] = "answer"
    metric_names: ClassVar[tuple[str, ...]] = tuple(f"eval_{name}" for name in ("loss", *REWARDS, "kl"))

    def describe(self) -> str:
        """Its name and options."""
        weights = f"{self.desirable_weight:g} and {self.undesirable_weight:g}"
        return f"KTO, beta {self.beta:g}" + ("" if weights == "1 and 1" else f", weights {weights}")

    def collate(self, examples: Sequence[ComparedExample]) -> AnswerBatch:
        """Pack judged answers, and the other answers to their prompts."""
        return collate_judged(examples)

    def step_sums(
        self, model: BloomForCausalLM, batches: Sequence[AnswerBatch], precision: Precision
    ) -> tuple[float, ...]:
        """The number of answers, and the sum of r over the other answers."""
        total = 0.0
        with eval_mode(model), torch.no_grad():
            for batch in batches:
                assert batch.others is not None
                scores = score_answers(model, batch.others, precision)
                total += float((scores.answers - batch.others.reference).sum())
        reshard(model)
        return sum(len(batch.spans) for batch in batches), total

    def loss_of(
        self, scores: AnswerScores, batch: AnswerBatch, step_sums: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the answers' losses, divided by the answers of the step."""
        divergence = max(0.0, step_sums[1] / step_sums[0])
        gains, desirable = scores.answers - batch.reference, batch.is_desirable
        signs = torch.where(desirable, 1.0, -1.0).to(gains.dtype)
        weights = torch.where(desirable, self.desirable_weight, self.undesirable_weight).to(gains.dtype)
        losses = weights * torch.sigmoid(-self.beta * signs * (gains - divergence))
        rewards = self.beta * gains
        num_desirable = desirable.sum().to(gains.dtype)
        sums = {
            "answers": gains.new_tensor(len(gains)),
            "desirable": num_desirable,
            "chosen": rewards[desirable].sum(),
            "rejected": rewards[~desirable].sum(),
            "kl": gains.new_tensor(divergence * len(gains)),
        }
        return losses.sum() / step_sums[0], sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean rewards of desirable and undesirable answers, their difference, and z; NaN for a mean of nothing."""
        desirable, undesirable = sums["desirable"], sums["answers"] - sums["desirable"]
        chosen = sums["chosen"] / desirable if desirable else math.nan
        rejected = sums["rejected"] / undesirable if undesirable else math.nan
        values = chosen, rejected, chosen - rejected, sums["kl"] / sums["answers"]
        return dict(zip((*REWARDS, "kl"), values, strict=True))
