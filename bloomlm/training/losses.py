"""The loss of a batch in training, and the mean loss of a set of examples in evaluation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.data.loader import Batch
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import tensor_parallel_group
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_tokens
from bloomlm.training.precision import Precision


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
        embedding = model.transformer.word_embeddings
        return linear_cross_entropy(
            hidden,
            embedding.weight,
            batch.labels,
            weight_scale=embedding.weight_scale,
            replaced=embedding.replaced_rows(),
            scale=scale,
            label_smoothing=label_smoothing,
            ranks=tensor_parallel_group(model),
            gradient_memory=gradient_memory,
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
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    num_correct, num_supervised_tokens = torch.zeros((), dtype=torch.int64, device=device), 0
    with torch.no_grad(), precision.autocast(device.type):
        for batch in batches:
            on_device = batch.to(device)
            hidden = model.transformer(on_device.tokens, Documents.packed(batch.lengths))
            embedding = model.transformer.word_embeddings
            score = score_tokens(
                hidden,
                embedding.weight,
                on_device.labels,
                weight_scale=embedding.weight_scale,
                replaced=embedding.replaced_rows(),
                ranks=tensor_parallel_group(model),
            )
            loss += score.loss
            num_correct += score.num_correct
            num_supervised_tokens += batch.num_supervised_tokens
    model.train(was_training)
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
