"""The job that `bloomlm plan` describes: its model, the work of a step, and the pass of a reference model before it."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bloomlm.checkpoint.tensor_reader import empty_model
from bloomlm.cli.plan_output import ReferencePass
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear
from bloomlm.model.quantized import Quantization
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.plan import scoring_memory
from bloomlm.parallel.traffic import Links, Traffic, scoring_traffic, step_traffic
from bloomlm.parallel.vocabulary_loss import MAX_CHUNK_BYTES
from bloomlm.parallel.workload import Workload
from bloomlm.training.config import TrainingConfig
from bloomlm.training.meter import StepFlops
from bloomlm.training.objectives.base import Objective
from bloomlm.training.precision import Precision
from bloomlm.training.reference import BATCH_TOKENS
from bloomlm.training.sections import fuses_update

_ANSWERS = 2
"""The reference scores an answer and another one of each example."""


def meta_model(
    config: BloomConfig,
    dtype: torch.dtype,
    linear_dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
) -> BloomForCausalLM:
    """A model on the meta device; see load_model."""
    model = empty_model(config, dtype, linear_dtype)
    if quantization is not None:
        for module in (found for found in model.modules() if isinstance(found, Linear | WordEmbedding)):
            rows = quantization.linear if isinstance(module, Linear) else quantization.embedding
            num_rows, width = module.weight.shape
            codes, module.weight_scale = rows.empty(num_rows, width, torch.device("meta"))
            module.weight = nn.Parameter(codes, requires_grad=False)
    return model


def workload(
    training: TrainingConfig,
    objective: Objective[Any],
    precision: Precision,
    num_processes: int,
    batch_size: int,
) -> Workload:
    """A training step with microbatches of batch_size examples, all of them as long as the flags allow."""
    num_documents = batch_size * objective.documents_per_example
    fuses = fuses_update(training, num_processes)
    num_prompt_labels = batch_size * objective.learned_prompts * (training.src_length - 1)
    return Workload(
        num_documents=num_documents,
        num_tokens=num_documents * _length(training),
        num_supervised_tokens=num_documents * training.tgt_length + num_prompt_labels,
        compute_dtype=precision.compute_dtype,
        max_chunk_bytes=MAX_CHUNK_BYTES,
        recompute=training.recompute,
        accumulation=training.gradient_accumulation_steps,
        uses_operator=training.device == "cpu",
        reshards=training.sharding == "stage3",
        fuses_update=fuses,
        factors_head=training.preference is None and (fuses or (precision.half_weights and not training.sharding)),
    )


def step_flops(model: BloomForCausalLM, training: TrainingConfig, objective: Objective[Any], load: Workload) -> int:
    """Operations of a step of one copy of the model."""
    flops, lengths = StepFlops(model), [_length(training)] * load.num_documents
    found = flops.of(lengths, load.num_supervised_tokens)
    if load.recompute:
        found += flops.recomputed(lengths)
    if objective.scored_per_example:
        found += _scored_flops(model, _scored(training, load, objective.scored_per_example))
    return found * load.accumulation


def job_traffic(
    model: BloomForCausalLM, training: TrainingConfig, objective: Objective[Any], load: Workload, degrees: Degrees
) -> list[Traffic]:
    """Everything that a rank exchanges in a step."""
    found = step_traffic(model, degrees, load, label_smoothing=training.label_smoothing > 0)
    if objective.scored_per_example:
        found += scoring_traffic(model, degrees, _scored(training, load, objective.scored_per_example))
    return found


def reference_pass(
    model: BloomForCausalLM, training: TrainingConfig, load: Workload, degrees: Degrees, links: Links
) -> ReferencePass:
    """What the log-probabilities of the reference cost.

    Args:
        model: the reference model, which has no adapter and does not learn.
        training: the flags.
        load: the work of a step.
        degrees: ranks along each axis.
        links: the speed of a process.
    """
    flops = _scored_flops(model, _scored(training, load, _ANSWERS)) * load.accumulation
    return ReferencePass(
        peak=scoring_memory(model, degrees, load, max(BATCH_TOKENS, _length(training))),
        seconds_a_step=flops / degrees.tp / links.flops_per_second,
    )


def _length(training: TrainingConfig) -> int:
    return training.src_length + training.tgt_length - 1  # nothing follows the last token


def _scored(training: TrainingConfig, load: Workload, num_documents: int) -> Workload:
    """The forward pass over so many documents of each example of a microbatch."""
    count = num_documents * training.per_device_train_batch_size
    return replace(
        load,
        num_documents=count,
        num_tokens=count * _length(training),
        num_supervised_tokens=count * training.tgt_length,
    )


def _scored_flops(model: BloomForCausalLM, load: Workload) -> int:
    lengths = [load.num_tokens // load.num_documents] * load.num_documents
    return StepFlops(model).scored(lengths, load.num_supervised_tokens)
