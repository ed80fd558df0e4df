"""Models, examples and comparisons of the tests that compute the same on the CPU and on the GPU."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.data.example import Example
from bloomlm.data.loader import BatchLoader
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer

GPU = torch.device("cuda")
CONFIG = BloomConfig(vocab_size=300, hidden_size=96, n_layer=2, n_head=3, initializer_range=0.15)
"""Heads of 32, which are 40 wide with the position columns: no power of two."""
LENGTHS = (37, 130, 1, 64)


def random_model(adapter: Adapter | None = None, config: BloomConfig = CONFIG) -> BloomForCausalLM:
    """A model on the CPU in which everything that can learn is away from its initial value."""
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    apply_adapter(model, adapter or FullTuning(), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def on_gpu(model: BloomForCausalLM) -> BloomForCausalLM:
    """A copy on the GPU."""
    return copy.deepcopy(model).to(GPU)


def examples(num: int = 12, longest: int = 120) -> list[Example]:
    """Random ones, of lengths that differ, with ids that every model of these tests has."""
    draw = np.random.default_rng(5)
    return [
        Example.pair(draw.integers(4, 250, int(source + target)).astype(np.int32), int(source))
        for source, target in zip(draw.integers(1, longest, num), draw.integers(2, longest, num), strict=True)
    ]


def trainer(
    model: BloomForCausalLM, precision: Precision | None = None, learning_rate: float = 5e-3, **step: Any
) -> Trainer:
    """Two microbatches of six examples of different lengths make a step, and all examples there are."""
    return Trainer(
        model,
        BatchLoader(examples(), 6, shuffle=True, seed=1),
        optimizer=AdamWConfig(weight_decay=0.01),
        schedule=ScheduleConfig(learning_rate=learning_rate).over(100),
        precision=precision or Precision(),
        config=StepConfig(**{"gradient_accumulation_steps": 2, **step}),
    )


def losses(
    model: BloomForCausalLM, precision: Precision | None = None, learning_rate: float = 5e-3, **step: Any
) -> list[float]:
    """Losses of the first five steps, which change the model."""
    run = trainer(model, precision, learning_rate, **step)
    return [run.run_step().loss for _ in range(5)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in fp64 on the CPU."""
    exact = expected.detach().double().cpu()
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())
