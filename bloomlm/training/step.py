"""One training step. It is the same for full tuning and all adapters, which differ in what requires a gradient.

A step updates the weights from gradient_accumulation_steps microbatches. All are fetched before the first one is
computed, so that the loss is the mean over their terms, as for one large batch (objectives/base.py). The last step of
an epoch takes the microbatches that are left. Every step seeds dropout from (seed, step), so a run that resumes does
not need the random state of earlier steps. Nothing here reads or writes files: Trainer.state and Trainer.load_state
exchange values.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bloomlm.data.loader import Batch, Batches
from bloomlm.errors import TrainingError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.layout import global_tensor
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.objectives.base import Objective
from bloomlm.training.objectives.cross_entropy import CROSS_ENTROPY
from bloomlm.training.optimizer import AdamWConfig, Schedule, build_optimizer, optimizer_tensors, set_learning_rate
from bloomlm.training.precision import LearnedParameters, LossScale, Precision, reason_to_skip
from bloomlm.training.results import StepResult, Totals
from bloomlm.training.update import FusedUpdate, GatheredUpdate, Update

logger = logging.getLogger(__name__)

MAX_NON_FINITE_STEPS = 10
"""A run ends after this many NaN or infinite losses in a row."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How gradients become an update."""

    gradient_accumulation_steps: int = 1
    """Number of microbatches of a step."""
    max_grad_norm: float = 1.0
    """Norm to which the gradients are clipped; 0 turns clipping off."""
    seed: int = 42
    """Seed of dropout."""
    fuses_update: bool = False
    """Whether weights are updated within the backward pass (update.py): one process, one microbatch a step, all weights
    learn, and gradients are neither clipped nor scaled."""


class Trainer:
    """The state of a run between two steps: model, optimizer, position in the data.

    Args:
        model: the model with its adapter, in precision.weights_dtype; parameters that require a gradient learn.
        batches: this rank's microbatches.
        optimizer: AdamW without its learning rate.
        schedule: learning rate of each step.
        precision: number formats.
        config: how gradients become an update.
        objective: what is minimised.
        mesh: the ranks among which model and batches are divided; every rank must make each call.

    Raises:
        TrainingError: no parameter requires a gradient.
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        batches: Batches,
        *,
        optimizer: AdamWConfig,
        schedule: Schedule,
        precision: Precision,
        config: StepConfig,
        objective: Objective[Any] = CROSS_ENTROPY,
        mesh: Mesh = ALONE,
    ) -> None:
        self.model = model
        self.mesh = mesh
        self.batches = batches
        self.schedule = schedule
        self.precision = precision
        self.config = config
        self.objective = objective
        self.step = 0
        self.totals = Totals()
        """Sums since the run began, including steps of earlier processes."""
        self.window = Totals()
        """Sums since the last log."""
        self.device = next(model.parameters()).device
        self.learned = LearnedParameters(model.named_parameters())
        if not self.learned.optimized:
            raise TrainingError("no parameter of the model requires a gradient; apply an adapter or FullTuning first")
        self._gradient_memory: list[Tensor] = []
        self.optimizer = build_optimizer(self.learned.optimized, optimizer)
        state, memory = (model, self.learned, self.optimizer, precision), self._gradient_memory
        self._update: Update = FusedUpdate(*state) if config.fuses_update else GatheredUpdate(*state, mesh, memory)
        self.loss_scale = LossScale(precision.initial_loss_scale) if precision.scales_loss else None
        self.non_finite_steps = 0
        """Number of NaN or infinite losses in a row."""
        self._epoch: Iterator[Batch] = iter(())

    @property
    def epoch(self) -> float:
        """Number of epochs done."""
        return self.step / self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of a whole epoch."""
        return steps_per_epoch(len(self.batches), self.config.gradient_accumulation_steps)

    def run_step(self) -> StepResult:
        """Update the weights once.

        Raises:
            TrainingError: the tenth NaN or infinite loss in a row, or a step without supervised tokens.
        """
        start = time.perf_counter()
        microbatches = [batch.to(self.device) for batch in self._next_microbatches()]
        num_tokens, num_supervised_tokens, step_sums = self._sum_up(microbatches)
        if num_supervised_tokens == 0:
            raise TrainingError(f"step {self.step + 1}: its examples have no supervised token; check the targets")
        torch.manual_seed(step_seed(self.config.seed, self.step, self.mesh.dp_rank))
        learning_rate = self.schedule(self.step)
        set_learning_rate(self.optimizer, learning_rate)
        loss, grad_norm, sums = self._accumulate_gradients(microbatches, step_sums)
        self.step += 1
        skipped = reason_to_skip(loss, grad_norm)
        if skipped is None:
            self._update.finish(self._gradient_factor(grad_norm))
        self._note(skipped, loss)
        self._drop_gradients()
        result = StepResult(
            step=self.step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=num_tokens,
            num_supervised_tokens=num_supervised_tokens,
            num_terms=step_sums[0],
            sums=sums,
            skipped=skipped,
            step_seconds=time.perf_counter() - start,
        )
        self.totals.add(result)
        self.window.add(result)
        return result

    def start_window(self) -> None:
        """Set the sums since the last log to zero."""
        self.window = Totals()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a later process needs to resume, besides the weight files of a checkpoint.

        Returns:
            Tensors by name, which share the memory of the run, and values for JSON.
        """
        tensors = {
            key: value if value.dim() == 0 else global_tensor(name, value, self.mesh)
            for name, parameter in self.learned.optimized.items()
            for key, value in optimizer_tensors(self.optimizer, {name: parameter}).items()
        }
        tensors["random_state"] = torch.get_rng_state()
        if self._saves_learned:
            learned = self.learned.optimized.items()
            tensors |= {f"learned/{name}": global_tensor(name, p.detach(), self.mesh) for name, p in learned}
        values = {
            "step": self.step,
            "seed": self.config.seed,
            "data": self.batches.state_dict(),
            "totals": vars(self.totals).copy(),
            "window": vars(self.window).copy(),
            "non_finite_steps": self.non_finite_steps,
            "loss_scale": None if self.loss_scale is None else vars(self.loss_scale).copy(),
        }
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            tensors: the tensors of this trainer's state(), into which the saved tensors have been read.
            values: the saved values.

        Raises:
            TrainingError: the saved run had another seed or other data.
        """
        if values["seed"] != self.config.seed:
            raise TrainingError(
                f"the saved run had seed {values['seed']}, this one has {self.config.seed}, so it cannot continue it. "
                "Use the same seed, or a new output_dir"
            )
        self.batches.load_state_dict(values["data"])
        self._epoch = iter(())
        self.step = values["step"]
        self.totals, self.window = Totals(**values["totals"]), Totals(**values["window"])
        self.non_finite_steps = values["non_finite_steps"]
        if self.loss_scale is not None and values["loss_scale"] is not None:
            vars(self.loss_scale).update(values["loss_scale"])
        torch.set_rng_state(tensors["random_state"])
        self.learned.copy_to_model()

    @property
    def _saves_learned(self) -> bool:
        """Whether state() holds what was learned; full tuning in fp32 reads it from the weight files instead."""
        return bool(self.learned.masters) or len(self.learned.optimized) < len(list(self.model.parameters()))

    def _next_microbatches(self) -> list[Batch]:
        microbatches: list[Batch] = []
        while not microbatches:
            for batch in self._epoch:
                microbatches.append(batch)
                if len(microbatches) == self.config.gradient_accumulation_steps:
                    return microbatches
            if not microbatches:
                self._epoch = iter(self.batches)
        return microbatches

    def _sum_up(self, microbatches: list[Batch]) -> tuple[int, int, list[float]]:
        """Tokens, supervised tokens and the objective's sums of the step, over all data-parallel ranks."""
        own = self.objective.step_sums(self.model, microbatches, self.precision)
        with_label = sum(batch.num_supervised_tokens for batch in microbatches)
        if self.mesh.degrees.dp == 1:
            return sum(len(batch.tokens) for batch in microbatches), with_label, list(own)
        total = sum(len(batch.tokens) for batch in microbatches if batch.num_supervised_tokens)
        sums = torch.tensor([total, with_label, *own], dtype=torch.float64, device=self.device)
        num_tokens, with_label, *step_sums = self.mesh.sum_over(sums, ("dp_replicate", "dp_shard")).tolist()
        return int(num_tokens), int(with_label), step_sums

    def _accumulate_gradients(
        self, microbatches: list[Batch], step_sums: list[float]
    ) -> tuple[float, float, dict[str, float]]:
        """Compute gradients, with the loss scale; return loss, gradient norm and the objective's sums, without it."""
        self.model.train()
        scale, memory = self._loss_scale_value, self._gradient_memory
        totals: dict[str, Tensor] = {}
        for batch in microbatches:
            result = self.objective.batch_loss(
                self.model, batch, self.precision, step_sums=step_sums, loss_scale=scale, gradient_memory=memory
            )
            self._update.backward(result.loss)
            result.add_to(totals)
        values = self.mesh.sum_over(torch.stack(list(totals.values())), ("dp_replicate", "dp_shard"))
        grad_norm, loss, *sums = torch.stack([self._update.norm().to(values), *values]).tolist()
        return loss / scale, grad_norm / scale, dict(zip(list(totals)[1:], sums, strict=True))

    def _drop_gradients(self) -> None:
        """Drop gradients, but keep the memory of the largest one, because new memory costs time in the next step."""
        weight = self.model.transformer.word_embeddings.weight
        gradient = self.learned.masters.get(weight, weight).grad
        # under FSDP it is a DTensor, whose shard is too small for the gradient of the whole weight
        self._gradient_memory[:] = [gradient] if type(gradient) is Tensor else []
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient_factor(self, grad_norm: float) -> float:
        """What the gradients are multiplied by: the inverse of the loss scale, and clipping."""
        clips = 0 < self.config.max_grad_norm < grad_norm
        return (self.config.max_grad_norm / grad_norm if clips else 1.0) / self._loss_scale_value

    def _note(self, skipped: str | None, loss: float) -> None:
        """Adjust the loss scale; report and count values that are not finite."""
        # a finite loss with infinite gradients means that the loss scale was too large, which is normal
        overflow = self.loss_scale is not None and not self.loss_scale.at_minimum and math.isfinite(loss)
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=skipped is not None)
        if skipped is None:
            self.non_finite_steps = 0
            return
        consequence = "" if self.loss_scale is None else f"; the loss scale is {self.loss_scale.value:g} now"
        outcome = self._update.when_skipped if math.isfinite(loss) else GatheredUpdate.when_skipped
        logger.warning("step %d: %s, so %s%s", self.step, skipped, outcome, consequence)
        if not overflow:
            self.non_finite_steps += 1
        if self.non_finite_steps >= MAX_NON_FINITE_STEPS:
            raise TrainingError(
                f"step {self.step}: {skipped}, the {self.non_finite_steps}th time in a row. Lower learning_rate, "
                "check the data, or use bf16 or fp32 instead of fp16"
            )

    @property
    def _loss_scale_value(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value


def step_seed(seed: int, step: int, dp_rank: int = 0) -> int:
    """Seed of the random numbers of a step, counted from 0, on a data-parallel rank."""
    return (seed * 1_000_003 + step + dp_rank * 0x9E3779B1) % 2**63


def steps_per_epoch(batches_per_epoch: int, gradient_accumulation_steps: int) -> int:
    """Number of steps of an epoch, the last of which may have fewer microbatches."""
    return -(-batches_per_epoch // gradient_accumulation_steps)
