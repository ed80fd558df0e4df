"""A tiny model, some examples and a trainer, the same on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.data.example import Example
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.training.precision import Precision
from tests.tiny_checkpoint import learned_tensors

CONFIG = BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
LENGTHS = [(3, 9), (5, 2), (1, 4), (6, 12), (2, 2), (4, 7), (2, 10), (7, 3)]
"""Source and target lengths of the examples, so that ranks have different numbers of supervised tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how."""

    adapter: Adapter = field(default_factory=FullTuning)
    post_layernorm: bool = False
    recompute: bool = False
    dropout: float = 0.0
    noise_alpha: float = 0.0
    label_smoothing: float = 0.0
    accumulation: int = 1
    max_grad_norm: float = 0.0
    precision: Precision = field(default_factory=Precision)
    epsilon: float = 1e-3
    batch_size: int = 4
    """Number of examples of a microbatch on all ranks together."""


def tiny_model(case: Case) -> BloomForCausalLM:
    """A random model whose adapter has no weight of zero."""
    config = BloomConfig(
        **{
            **{name: getattr(CONFIG, name) for name in ("vocab_size", "hidden_size", "n_layer", "n_head")},
            "initializer_range": CONFIG.initializer_range,
            "hidden_dropout": case.dropout,
            "attention_dropout": case.dropout,
            "apply_residual_connection_post_layernorm": case.post_layernorm,
        }
    )
    model = BloomForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    apply_adapter(model, case.adapter, generator)
    if not isinstance(case.adapter, FullTuning):
        for tensor in learned_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.transformer.recompute = case.recompute
    model.transformer.noise_alpha = case.noise_alpha
    return model.to(case.precision.weights_dtype)


def some_examples(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[Example]:
    """Examples of random tokens."""
    generator = np.random.default_rng(5)
    return [
        Example.pair(generator.integers(4, CONFIG.vocab_size, source + target).astype(np.int32), source)
        for source, target in lengths
    ]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Assert equal names, and equal tensors up to tolerance times the largest element of each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((found[name].double() - tensor.double()).abs().max())
        scale = float(tensor.double().abs().max())
        assert error <= tolerance * max(scale, 1e-3), f"{name}: off by {error:.3g} of {scale:.3g}"


def values(result: Any) -> dict[str, float]:
    """The numbers of a result without times."""
    numbers = {name: value for name, value in vars(result).items() if name not in ("step_seconds", "sums")}
    return {**numbers, **vars(result).get("sums", {})}
