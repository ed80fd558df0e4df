"""Learning to write given tokens: the cross entropy of a batch in training, and its mean in evaluation."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bloomlm.data.example import Example
from bloomlm.data.loader import Batch, collate
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.decoding import eval_mode
from bloomlm.model.documents import Documents
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import head_of
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_tokens
from bloomlm.training.objectives.base import BatchLoss, Objective
from bloomlm.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective[Batch]):
    """The mean cross entropy of the supervised tokens."""

    label_smoothing: float = 0.0
    """Probability that is spread over the whole vocabulary in the targets; not in evaluation."""

    loss_unit: ClassVar[str] = "learned token"
    metric_names: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_ppl", "eval_accuracy")
    lower_is_better: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_ppl")

    def describe(self) -> str:
        """Its label smoothing, if there is any."""
        return f"label smoothing {self.label_smoothing:g} in training" if self.label_smoothing else ""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pack examples."""
        return collate(examples)

    def step_sums(self, model: BloomForCausalLM, batches: Sequence[Batch], precision: Precision) -> tuple[float, ...]:
        """The number of supervised tokens."""
        return (sum(batch.num_supervised_tokens for batch in batches),)

    def batch_loss(
        self,
        model: BloomForCausalLM,
        batch: Batch,
        precision: Precision,
        *,
        step_sums: Sequence[float],
        loss_scale: float = 1.0,
        gradient_memory: list[Tensor] | None = None,
    ) -> BatchLoss:
        """The sum of the tokens' losses, divided by the supervised tokens of the step."""
        loss = batch_loss(
            model,
            batch,
            precision,
            scale=loss_scale / step_sums[0],
            label_smoothing=self.label_smoothing,
            gradient_memory=gradient_memory,
        )
        return BatchLoss(loss=loss, sums={})

    def evaluate(
        self, model: BloomForCausalLM, batches: Iterable[Batch], precision: Precision, mesh: Mesh
    ) -> dict[str, float]:
        """Loss, perplexity and token accuracy; see evaluate_loss."""
        result = evaluate_loss(model, batches, precision, mesh)
        return {"eval_loss": result.loss, "eval_ppl": result.perplexity, "eval_accuracy": result.token_accuracy}


CROSS_ENTROPY = CrossEntropy()
"""The objective unless another one is wanted."""


def batch_loss(
    model: BloomForCausalLM,
    batch: Batch,
    precision: Precision,
    *,
    scale: float,
    label_smoothing: float = 0.0,
    gradient_memory: list[Tensor] | None = None,
) -> Tensor:
    """The sum of the losses of a batch's supervised tokens, times scale: a scalar.

    Args:
        model: in training mode.
        batch: on the model's device.
        precision: number formats.
        scale: factor of the loss. The gradients are computed in the forward pass and include it.
        label_smoothing: probability that is spread over the whole vocabulary.
        gradient_memory: see linear_cross_entropy.
    """
    with precision.autocast(batch.tokens.device.type):
        hidden = model.transformer(batch.tokens, Documents.packed(batch.lengths))
        parts = model.transformer.word_embeddings.gradient_parts
        return linear_cross_entropy(
            hidden,
            head_of(model),
            batch.labels,
            scale=scale,
            label_smoothing=label_smoothing,
            gradient_memory=gradient_memory,
            gradient_parts=None if parts is None else parts.of_head,
        )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """How well a model predicts the tokens that have a label."""

    loss: float
    """Mean cross entropy, without label smoothing."""
    token_accuracy: float
    """Fraction of the tokens that are the likeliest by the model."""
    num_supervised_tokens: int
    """Number of tokens with a label."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity if that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate_loss(
    model: BloomForCausalLM, batches: Iterable[Batch], precision: Precision, mesh: Mesh = ALONE
) -> EvalResult:
    """Mean loss and token accuracy over the supervised tokens of all batches.

    Args:
        model: switched to evaluation mode during the call.
        batches: a finite number of batches.
        precision: number formats, as in training.
        mesh: the ranks. Data-parallel ranks pass equally many, different batches; all get the same result.

    Raises:
        TrainingError: no token has a label.
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    num_correct, num_supervised_tokens = torch.zeros((), dtype=torch.int64, device=device), 0
    with eval_mode(model), torch.no_grad(), precision.autocast(device.type):
        for batch in batches:
            on_device = batch.to(device)
            hidden = model.transformer(on_device.tokens, Documents.packed(batch.lengths))
            score = score_tokens(hidden, head_of(model), on_device.labels)
            loss += score.loss
            num_correct += score.num_correct
            num_supervised_tokens += batch.num_supervised_tokens
    reshard(model)
    if mesh.degrees.dp > 1:
        sums = torch.stack([loss, num_correct.double(), loss.new_tensor(num_supervised_tokens)])
        loss, num_correct, tokens = mesh.sum_over(sums, ("dp_replicate", "dp_shard"))
        num_supervised_tokens = int(tokens)
    if num_supervised_tokens == 0:
        raise TrainingError("the evaluation examples have no token with a label; check the targets")
    return EvalResult(
        loss=float(loss) / num_supervised_tokens,
        token_accuracy=int(num_correct) / num_supervised_tokens,
        num_supervised_tokens=num_supervised_tokens,
    )
