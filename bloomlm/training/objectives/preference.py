"""What objectives over whole answers share: log-probabilities of answers, rewards, and evaluation.

The reward of an answer is how much likelier the model finds it than the reference does, times beta; without a
reference, its mean log-probability times beta. Sums over tokens are fp64, because a reward is the small difference of
two of them.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bloomlm.data.answer_batch import AnswerBatch, ComparedExample, collate_pairs
from bloomlm.data.preferences import AnswerPairs, ComparedSet
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.decoding import eval_mode
from bloomlm.model.documents import Documents
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import Mesh
from bloomlm.parallel.tensor_parallel import head_of
from bloomlm.parallel.vocabulary_log_probs import linear_log_probs
from bloomlm.training.objectives.base import BatchLoss, Objective
from bloomlm.training.precision import Precision

REWARDS = ("rewards_chosen", "rewards_rejected", "rewards_margin")


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Sums of log-probabilities over the tokens of each answer, fp64, in the order of the batch."""

    answers: Tensor
    """[answers]: over the answer alone, </s> included."""
    whole: Tensor
    """[answers]: over all spans of learned tokens."""


def score_answers(
    model: BloomForCausalLM, batch: AnswerBatch, precision: Precision, gradient_memory: list[Tensor] | None = None
) -> AnswerScores:
    """Log-probabilities of the answers of a batch, with gradients unless they are off.

    Args:
        model: computes them.
        batch: on the model's device.
        precision: number formats.
        gradient_memory: see linear_cross_entropy.
    """
    with precision.autocast(batch.tokens.device.type):
        hidden = model.transformer(batch.tokens, Documents.packed(batch.lengths))
        log_probs = linear_log_probs(hidden, head_of(model), batch.labels, gradient_memory=gradient_memory).double()
    if not batch.spans:  # nothing, but it depends on the model like everything else
        return AnswerScores(answers=log_probs, whole=log_probs)
    pieces = iter(log_probs.split([length for spans in batch.spans for length in spans]))
    sums = [[next(pieces).sum() for _ in spans] for spans in batch.spans]
    return AnswerScores(
        answers=torch.stack([spans[-1] for spans in sums]),
        whole=torch.stack([sum(spans[1:], spans[0]) for spans in sums]),
    )


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(Objective[AnswerBatch]):
    """An objective over answers that are compared."""

    beta: float = 0.1
    """Factor of the rewards."""

    uses_reference: ClassVar[bool] = True
    lower_is_better: ClassVar[tuple[str, ...]] = ("eval_loss",)

    @abstractmethod
    def loss_of(
        self, scores: AnswerScores, batch: AnswerBatch, step_sums: Sequence[float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of a batch in the mean loss of a step, and sums for `metrics`."""

    def batch_loss(
        self,
        model: BloomForCausalLM,
        batch: AnswerBatch,
        precision: Precision,
        *,
        step_sums: Sequence[float],
        loss_scale: float = 1.0,
        gradient_memory: list[Tensor] | None = None,
    ) -> BatchLoss:
        """See Objective."""
        loss, sums = self.loss_of(score_answers(model, batch, precision, gradient_memory), batch, step_sums)
        return BatchLoss(loss=loss * loss_scale, sums={name: value.detach() for name, value in sums.items()})

    def evaluate(
        self, model: BloomForCausalLM, batches: Iterable[AnswerBatch], precision: Precision, mesh: Mesh
    ) -> dict[str, float]:
        """The mean loss and the metrics; see Objective."""
        device = next(model.parameters()).device
        on_device = [batch.to(device) for batch in batches]
        with eval_mode(model), torch.no_grad():
            own = torch.tensor(self.step_sums(model, on_device, precision), dtype=torch.float64, device=device)
            step_sums = mesh.sum_over(own, ("dp_replicate", "dp_shard")).tolist()
            if step_sums[0] == 0:
                raise TrainingError("there are no answers to evaluate")
            totals: dict[str, Tensor] = {}
            for batch in on_device:
                self.batch_loss(model, batch, precision, step_sums=step_sums).add_to(totals)
        reshard(model)
        values = mesh.sum_over(torch.stack(list(totals.values())), ("dp_replicate", "dp_shard")).tolist()
        sums = dict(zip(totals, values, strict=True))
        return {f"eval_{name}": value for name, value in {"loss": sums["loss"], **self.metrics(sums)}.items()}


@dataclass(frozen=True, kw_only=True)
class PairObjective(PreferenceObjective):
    """An objective over pairs of a chosen and a rejected answer."""

    compared_set: ClassVar[type[ComparedSet] | None] = AnswerPairs
    documents_per_example: ClassVar[int] = 2
    loss_unit: ClassVar[str] = "pair"

    def collate(self, examples: Sequence[ComparedExample]) -> AnswerBatch:
        """Pack pairs."""
        return collate_pairs(examples)

    def step_sums(
        self, model: BloomForCausalLM, batches: Sequence[AnswerBatch], precision: Precision
    ) -> tuple[float, ...]:
        """The number of pairs."""
        return (sum(len(batch.spans) // 2 for batch in batches),)

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Mean rewards of chosen and rejected answers, their difference, and how often it is positive."""
        chosen, rejected = sums["chosen"] / sums["pairs"], sums["rejected"] / sums["pairs"]
        values = chosen, rejected, chosen - rejected
        return {**dict(zip(REWARDS, values, strict=True)), "rewards_accuracy": sums["ordered"] / sums["pairs"]}


def paired(values: Tensor) -> Tensor:
    """[2 * pairs] -> [pairs, 2]: those of chosen and rejected answers, of which a batch may have none."""
    return values.view(len(values) // 2, 2)


def reward_sums(rewards: Tensor) -> dict[str, Tensor]:
    """Sums for PairObjective.metrics, from rewards [pairs, 2] of chosen and rejected answers."""
    chosen, rejected = rewards.unbind(dim=1)
    return {
        "pairs": rewards.new_tensor(len(rewards)),
        "chosen": chosen.sum(),
        "rejected": rejected.sum(),
        "ordered": (chosen > rejected).sum().to(rewards.dtype),
    }
