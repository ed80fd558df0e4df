"""Checks the numerics of a device on the built-in model, against the same computation in float64 on the CPU.

Every check measures a relative error (norm of the difference over norm of what is right) and has a limit, a few times
what correct devices reach. Wrong kernels, drivers and builds of PyTorch are above it by orders of magnitude.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.api import load
from bloomlm.data.example import Example
from bloomlm.data.loader import Batch, BatchLoader, collate
from bloomlm.errors import first_line
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.kernels.compiled import load_operators_for
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer

MODEL = "builtin:tiny"
LENGTHS = (90, 17, 140, 41)
"""Tokens of the examples: different, so that training on a GPU takes the kernel for packed documents."""
NUM_STEPS = 3
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check."""

    name: str
    """What was computed."""
    error: float | None
    """Relative error; None if the check could not be computed."""
    limit: float
    """The largest error of a device that computes correctly."""
    seconds: float
    """Time that it took, compilation included."""
    problem: str | None = None
    """Why it could not be computed."""

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit, which NaN is not."""
        return self.error is not None and self.error <= self.limit


def self_test(device: torch.device) -> Iterator[Check]:
    """Run the checks one after another; one that raises an error has failed."""
    load_operators_for(device)
    subject = _Subject(device)
    checks: tuple[tuple[str, float, Callable[[], float]], ...] = (
        ("logits in fp32", 1e-5, lambda: subject.logits_error(torch.float32)),
        ("logits in bf16", 3e-2, lambda: subject.logits_error(torch.bfloat16)),
        ("logits in fp16", 5e-3, lambda: subject.logits_error(torch.float16)),
        ("loss and gradients in fp32", 1e-4, lambda: subject.gradient_error(Precision())),
        ("loss and gradients in bf16", 5e-2, lambda: subject.gradient_error(Precision(compute_dtype=torch.bfloat16))),
        ("packed documents equal single ones", 1e-4, subject.packing_error),
        ("LoRA: losses of 3 steps in fp32", 1e-5, subject.step_error),
        ("generation equals passes without a cache", 0.0, subject.generation_error),
    )
    for name, limit, compute in checks:
        start = time.perf_counter()
        error, problem = None, None
        try:
            error = compute()
        except Exception as failure:  # whatever it is, the report must name it and go on
            problem = f"{type(failure).__name__}: {first_line(failure)}"
        yield Check(name=name, error=error, limit=limit, seconds=time.perf_counter() - start, problem=problem)


class _Examples(list[Example]):
    @property
    def lengths(self) -> Sequence[int]:
        return [len(example.tokens) for example in self]


class _Subject:
    """The built-in model in float64 on the CPU, and what is compared with it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.exact = load(MODEL, dtype=torch.float64).model
        draw = np.random.default_rng(0)
        self.examples = _Examples(
            Example.pair(draw.integers(4, self.exact.config.vocab_size, length).astype(np.int32), length // 3)
            for length in LENGTHS
        )
        self.batch = collate(self.examples)

    def model(self, dtype: torch.dtype) -> BloomForCausalLM:
        """The model on the device."""
        return copy.deepcopy(self.exact).to(self.device, dtype)

    @torch.no_grad()
    def logits_error(self, dtype: torch.dtype) -> float:
        """Of the logits of one long document."""
        tokens = torch.cat([torch.from_numpy(example.tokens.astype(np.int64)) for example in self.examples])[None]
        return _error(self.model(dtype)(tokens.to(self.device)), self.exact(tokens))

    def gradient_error(self, precision: Precision) -> float:
        """The largest of the loss and the gradients of all weights, for packed examples."""
        expected = _gradients(self.exact, self.batch, Precision())
        found = _gradients(self.model(torch.float32), self.batch.to(self.device), precision)
        return max(_error(found[name], gradient) for name, gradient in expected.items())

    def packing_error(self) -> float:
        """The largest of the gradients of packed examples against those of single ones, on the device."""
        model, whole = self.model(torch.float32), self.batch.num_supervised_tokens
        packed = _gradients(model, self.batch.to(self.device), Precision())
        sums: dict[str, Tensor] = {}
        for example in self.examples:
            batch = collate([example])
            share = batch.num_supervised_tokens / whole
            for name, gradient in _gradients(model, batch.to(self.device), Precision()).items():
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + share * gradient
        return max(_error(packed[name], gradient) for name, gradient in sums.items())

    def step_error(self) -> float:
        """Of the losses of some steps, each of which changes the adapter."""
        adapted = copy.deepcopy(self.exact)
        apply_adapter(adapted, LoraConfig(r=4, target_modules=BLOCK_LINEARS), torch.Generator().manual_seed(0))
        on_device = copy.deepcopy(adapted).to(self.device, torch.float32)
        found, expected = (torch.tensor(self._losses(model)) for model in (on_device, adapted))
        return _error(found, expected)

    def _losses(self, model: BloomForCausalLM) -> list[float]:
        trainer = Trainer(
            model,
            BatchLoader(self.examples, len(self.examples), shuffle=False, seed=0),
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(learning_rate=1e-2).over(NUM_STEPS),
            precision=Precision(),
            config=StepConfig(),
        )
        return [trainer.run_step().loss for _ in range(NUM_STEPS)]

    def generation_error(self) -> float:
        """The share of the tokens of sequences in a cache that passes over the whole text do not give."""
        model = self.model(torch.float32)
        prompts = [
            example.tokens[:length].tolist() for example, length in zip(self.examples, (5, 17, 60), strict=False)
        ]
        results = generate(model, prompts, GenerationConfig(max_new_tokens=12, min_new_tokens=12))
        wrong = total = 0
        with torch.inference_mode():
            for prompt, result in zip(prompts, results, strict=True):
                ids = torch.tensor([[*prompt, *result.tokens]], device=self.device)
                chosen = model(ids)[0, len(prompt) - 1 : -1]
                chosen[:, model.config.eos_token_id] = -torch.inf
                wrong += int((chosen.argmax(1) != ids[0, len(prompt) :]).sum())
                total += len(result.tokens)
        return wrong / total


def _gradients(model: BloomForCausalLM, batch: Batch, precision: Precision) -> dict[str, Tensor]:
    """The mean loss of a batch and its gradients by the parameters' names."""
    apply_adapter(model, FullTuning(), None)
    model.train().zero_grad(set_to_none=True)
    loss = batch_loss(model, batch, precision, scale=1 / batch.num_supervised_tokens)
    loss.backward()
    gradients = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.eval()
    return {"loss": loss.detach(), **gradients}


def _error(found: Tensor, expected: Tensor) -> float:
    exact = expected.detach().double().to(_CPU)
    return float((found.detach().double().to(_CPU) - exact).norm() / exact.norm())
