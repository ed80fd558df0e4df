"""The protocol of an objective: what a batch is, what its loss is, and which numbers are reported beside the loss.

The loss of a step is a mean over its terms (supervised tokens, or pairs of answers), so that microbatches and
data-parallel ranks change nothing: first `step_sums` of all of them are added up, then each `batch_loss` is its share
of the step's loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from bloomlm.data.loader import Batch
from bloomlm.data.preferences import ComparedSet
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.precision import Precision

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """What a batch adds to a step."""

    loss: Tensor
    """Scalar to differentiate: the batch's share of the step's mean loss, times the loss scale."""
    sums: Mapping[str, Tensor]
    """Sums over the batch from which `Objective.metrics` computes what is reported: scalars without gradient, the same
    names for every batch."""

    def add_to(self, totals: dict[str, Tensor]) -> None:
        """Add the loss, as "loss", and the sums to those of other batches."""
        for name, value in {"loss": self.loss.detach(), **self.sums}.items():
            totals[name] = totals[name] + value if name in totals else value


class Objective(ABC, Generic[B]):
    """What a run minimises, from batches of one class; a frozen value."""

    compared_set: ClassVar[type[ComparedSet] | None] = None
    """What the rows become; None: their fields decide."""
    uses_reference: ClassVar[bool] = False
    """Whether a batch needs log-probabilities under the reference model."""
    documents_per_example: ClassVar[int] = 1
    """How many documents of a batch have gradients for each example."""
    scored_per_example: ClassVar[int] = 0
    """How many more documents of each example a step scores without gradients."""
    learned_prompts: ClassVar[int] = 0
    """How many documents of an example learn their prompts too, but for the first token."""
    loss_unit: ClassVar[str]
    """Over what the loss is a mean, in the singular."""
    metric_names: ClassVar[tuple[str, ...]]
    """What `evaluate` reports, the loss first; the names begin with eval_."""
    lower_is_better: ClassVar[tuple[str, ...]]
    """Those of metric_names of which smaller values are better."""

    @abstractmethod
    def describe(self) -> str:
        """What is special about it, for titles; empty for the default."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> B:
        """Make a batch of examples; without examples, a batch that takes part in every exchange and changes nothing."""

    @abstractmethod
    def step_sums(self, model: BloomForCausalLM, batches: Sequence[B], precision: Precision) -> tuple[float, ...]:
        """Sums over this rank's batches that the loss of each of them depends on, the number of terms first."""

    @abstractmethod
    def batch_loss(
        self,
        model: BloomForCausalLM,
        batch: B,
        precision: Precision,
        *,
        step_sums: Sequence[float],
        loss_scale: float = 1.0,
        gradient_memory: list[Tensor] | None = None,
    ) -> BatchLoss:
        """The loss of a batch.

        Args:
            model: in training mode.
            batch: on the model's device; from `collate`.
            precision: number formats.
            step_sums: `step_sums` of all batches of the step, added up over the data-parallel ranks.
            loss_scale: factor of the loss.
            gradient_memory: see linear_cross_entropy.
        """

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is reported beside the loss, from the sums of any number of batches on all ranks."""
        return {}

    @abstractmethod
    def evaluate(
        self, model: BloomForCausalLM, batches: Iterable[B], precision: Precision, mesh: Mesh
    ) -> dict[str, float]:
        """The mean loss and the metrics over all batches, by the names of metric_names.

        Args:
            model: switched to evaluation mode during the call.
            batches: a finite number of batches. Data-parallel ranks pass equally many, different ones, and get the same
                result.
            precision: number formats, as in training.
            mesh: the ranks.

        Raises:
            TrainingError: there is no term.
        """
