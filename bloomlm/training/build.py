"""The parts of a run made from its flags: adapter, model, trainer."""

import math
from pathlib import Path

import torch

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.imported_run import RecordedAdapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.data.loader import BatchLoader, Examples
from bloomlm.data.packing import TokenBudget
from bloomlm.model.attention import attend
from bloomlm.model.bloom import BloomBlock, BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
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
    config: TrainingConfig,
    source: Path,
    precision: Precision,
    checkpoint: Path | None,
    structure: RecordedAdapter | None = None,
    mesh: Mesh = ALONE,
) -> BloomForCausalLM:
    """The model with its adapter applied; a fully tuned one that goes on comes from its checkpoint.

    Args:
        config: resolved.
        source: directory of the model to start from.
        precision: of the weights.
        checkpoint: to go on from; None: a fresh run.
        structure: of an adapter that another program began; None: as the flags say.
        mesh: the ranks to divide the model among.
    """
    adapter = adapter_from_flags(config)
    device = torch.device("cuda" if config.device == "gpu" else "cpu")
    generator = torch.Generator(device).manual_seed(config.seed)

    def install(model: BloomForCausalLM) -> None:
        if structure is not None:
            structure.install(model, device)
        else:
            apply_adapter(model, adapter, generator, device)

    model = load_model(
        checkpoint if checkpoint is not None and adapter.trains_base else source,
        dtype=precision.weights_dtype,
        device=device,
        memory_map=False,
        int8=config.base_quantization == "int8",
        mesh=mesh,
        install_adapter=install,
        reshard_after_forward=config.sharding == "stage3",
    )
    if mesh.is_alone:
        install(model)
    else:
        adapter.start_from_weights(model)
    model.transformer.recompute = config.recompute
    if config.torch_compile:
        compile_blocks(model)
    return model


def compile_blocks(model: BloomForCausalLM, backend: str = "inductor") -> None:
    """Let torch.compile make kernels of what lies between the blocks' products.

    Args:
        model: with its adapter applied.
        backend: of torch.compile.
    """
    for block in model.transformer.h:
        assert isinstance(block, BloomBlock)
        # attention stays outside: the documents' lengths would be built into it, and every batch compiled anew
        block.self_attention.attend = torch.compiler.disable(attend)
        block.compile(backend=backend)


def build_trainer(
    config: TrainingConfig,
    model: BloomForCausalLM,
    examples: Examples,
    precision: Precision,
    mesh: Mesh = ALONE,
) -> tuple[Trainer, int]:
    """The trainer at step 0, and how many steps the run has.

    Args:
        config: resolved.
        model: with its adapter applied.
        examples: to learn.
        precision: number formats.
        mesh: the ranks among which the model is divided.
    """
    budget = config.max_tokens_per_batch
    batch_size = config.per_device_train_batch_size if budget is None else TokenBudget(budget)
    batches = BatchLoader(
        examples,
        batch_size,
        shuffle=True,
        seed=config.seed,
        dp_degree=mesh.degrees.dp,
        dp_rank=mesh.dp_rank,
    )
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
            optim=config.optim,
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
        mesh=mesh,
    )
    return trainer, max_steps
