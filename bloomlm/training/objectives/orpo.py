"""Odds ratio preference optimisation, without a reference model: https://arxiv.org/abs/2403.07691, equations 4 to 7.

With a = the mean log-probability of the tokens of an answer, the odds of the answer are exp(a) / (1 - exp(a)). The loss
is the mean cross entropy of the chosen sequences minus beta times the mean of log sigmoid(log odds_chosen - log
odds_rejected) over the pairs. As in the authors' program and in TRL, the cross entropy includes the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.data.answer_batch import AnswerBatch, ComparedExample, collate_pairs
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.training.objectives.preference import REWARDS, AnswerScores, PairObjective, paired, reward_sums
from bloomlm.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Orpo(PairObjective):
    """Learn to write the chosen sequences, and make their answers likelier than the rejected ones."""

    uses_reference: ClassVar[bool] = False
    learned_prompts: ClassVar[int] = 1
    metric_names: ClassVar[tuple[str, ...]] = tuple(
        f"eval_{name}" for name in ("loss", *REWARDS, "rewards_accuracy", "chosen_nll")
    )
    lower_is_better: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_chosen_nll")

    def describe(self) -> str:
        """Its name and options."""
        return f"ORPO, beta {self.beta:g}"

    def collate(self, examples: Sequence[ComparedExample]) -> AnswerBatch:
        """Pack pairs; the prompt of the chosen answer is learned too."""
        return collate_pairs([_with_learned_prompt(example) for example in examples])

    def step_sums(
        self, model: BloomForCausalLM, batches: Sequence[AnswerBatch], precision: Precision
    ) -> tuple[float, ...]:
        """The number of pairs, and the number of labels in chosen sequences."""
        (pairs,) = super().step_sums(model, batches, precision)
        return pairs, sum(map(_num_chosen_labels, batches))

    def loss_of(
        self, scores: AnswerScores, batch: AnswerBatch, step_sums: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's share of the two means."""
        lengths = scores.answers.new_tensor([spans[-1] for spans in batch.spans])
        means = paired(scores.answers / lengths)
        log_odds = means - torch.log(-torch.expm1(means))
        ratios = F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
        nll = -scores.whole[::2].sum()
        sums = {
            **reward_sums(self.beta * means),
            "nll": nll,
            "chosen_labels": lengths.new_tensor(_num_chosen_labels(batch)),
        }
        return nll / step_sums[1] - self.beta * ratios.sum() / step_sums[0], sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Rewards, and the mean cross entropy of the chosen sequences."""
        return {**super().metrics(sums), "chosen_nll": sums["nll"] / sums["chosen_labels"]}


def _num_chosen_labels(batch: AnswerBatch) -> int:
    return sum(map(sum, batch.spans[::2]))


def _with_learned_prompt(pair: ComparedExample) -> ComparedExample:
    start, stop = pair.learned[-1]
    return pair if start < 2 else replace(pair, learned=((1, start), (start, stop)))
