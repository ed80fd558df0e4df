"""The parts of a run made from its flags: adapter, model, trainer."""

import math
from pathlib import Path

import torch

from bloomlm.adapters.apply import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.data.loader import BatchLoader, Examples
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.training.config import TrainingConfig
from bloomlm.training.optimizer import AdamWConfig, build_schedule
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer, steps_per_epoch


def adapter_from_flags(config: TrainingConfig) -> Adapter:
    """What the flags let learn."""
    if config.lora:
        return LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
        )
    if config.prefix_tuning:
        return PrefixConfig(num_prefix_tokens=config.num_prefix_tokens, prefix_projection=config.prefix_projection)
    return FullTuning()


def load_to_train(
    config: TrainingConfig, source: Path, precision: Precision, checkpoint: Path | None
) -> BloomForCausalLM:
    """The model with its adapter applied; a fully tuned one that goes on comes from its checkpoint.

    Args:
        config: resolved.
        source: directory of the model to start from.
        precision: of the weights.
        checkpoint: to go on from; None: a fresh run.
    """
    adapter = adapter_from_flags(config)
    device = torch.device("cuda" if config.device == "gpu" else "cpu")
    model = load_model(
        checkpoint if checkpoint is not None and isinstance(adapter, FullTuning) else source,
        dtype=precision.weights_dtype,
        device=device,
        memory_map=False,
    )
    apply_adapter(model, adapter, torch.Generator(device).manual_seed(config.seed))
    model.transformer.recompute = config.recompute
    return model


def build_trainer(
    config: TrainingConfig, model: BloomForCausalLM, examples: Examples, precision: Precision
) -> tuple[Trainer, int]:
    """The trainer at step 0, and how many steps the run has.

    Args:
        config: resolved.
        model: with its adapter applied.
        examples: to learn.
        precision: number formats.
    """
    batches = BatchLoader(examples, config.per_device_train_batch_size, shuffle=True, seed=config.seed)
    per_epoch = steps_per_epoch(len(batches), config.gradient_accumulation_steps)
    max_steps = config.max_steps if config.max_steps > 0 else max(1, math.ceil(config.num_train_epochs * per_epoch))
    trainer = Trainer(
        model,
        batches,
        optimizer=AdamWConfig(
            weight_decay=config.weight_decay,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
        ),
        schedule=build_schedule(
            learning_rate=config.learning_rate,
            max_steps=max_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            warmup_ratio=config.warmup_ratio,
            lr_decay_ratio=config.lr_decay_ratio,
        ),
        precision=precision,
        config=StepConfig(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        ),
    )
    return trainer, max_steps
