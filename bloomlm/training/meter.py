"""Measures a run: arithmetic, padding, memory, and (with --profile) the time of operations in a few steps.

Counted are the matrix products that training needs, without what recompute computes a second time. Source: the PaLM
paper, https://arxiv.org/abs/2204.02311, appendix B, extended to supervised positions, documents of different lengths
and frozen weights.

Shapes: N packed tokens, M supervised ones, T tokens of a document, P virtual tokens, D hidden, V vocabulary.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bloomlm.data.loader import Batch, Batches
from bloomlm.files.atomic import atomic_write
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.linear import Linear, linear
from bloomlm.model.shard import own_part
from bloomlm.training.step import Trainer

WARM_UP_STEPS = 2
PROFILED_STEPS = 3
PROFILE_DIRECTORY = "profile"
TRACE_FILE = "trace.json"
TABLE_FILE = "operations.txt"
_TABLE_ROWS = 10


class StepFlops:
    """Floating-point operations of the forward and backward passes of a model with its adapter."""

    def __init__(self, model: BloomForCausalLM) -> None:
        config = model.config
        self._num_virtual = model.transformer.num_virtual_tokens
        embedding = model.transformer.word_embeddings.weight
        self._per_token = self._forward_per_token = self._per_pass = 0
        # the gradient of a layer's input is needed if something before the layer learns
        needs_input_gradient = model.transformer.word_embeddings.learns
        for block in model.transformer.h:
            for module in block.modules():
                if not isinstance(module, Linear):
                    continue
                passes = 1 + needs_input_gradient + module.weight.requires_grad
                weight_flops = 2 * module.num_weights * module.num_weight_products
                self._per_token += weight_flops * passes
                self._forward_per_token += weight_flops
                self._per_pass += module.pass_flops
                for number, matrix in enumerate(module.update_matrices):
                    # the gradient of what comes from a matrix that learns is always needed
                    self._per_token += 2 * matrix.numel() * (2 + (needs_input_gradient or number > 0))
                    self._forward_per_token += 2 * matrix.numel()
                learns = any(parameter.requires_grad for parameter in module.parameters())
                needs_input_gradient = needs_input_gradient or learns or self._num_virtual > 0
        # products of queries with keys and of weights with values, each once forward and twice backward
        self._per_pair = 12 * config.hidden_size * config.n_layer
        self._head_per_label = 2 * config.vocab_size * config.hidden_size
        self._per_supervised = self._head_per_label * (2 + embedding.requires_grad)

    def recomputed(self, lengths: Sequence[int]) -> int:
        """Operations of a batch that recompute repeats, which are the forward pass of the blocks."""
        return self._forward_per_token * sum(lengths) + self._per_pair // 3 * self._num_pairs(lengths) + self._per_pass

    def scored(self, lengths: Sequence[int], num_labels: int) -> int:
        """Operations of a forward pass alone, with the head for a number of labels."""
        return self.recomputed(lengths) + self._head_per_label * num_labels

    def of(self, lengths: Sequence[int], num_supervised_tokens: int) -> int:
        """Operations of a batch with documents of these lengths (T) and a number of supervised tokens (M)."""
        tokens = self._per_token * sum(lengths) + self._per_supervised * num_supervised_tokens
        return tokens + self._per_pair * self._num_pairs(lengths) + self._per_pass

    def _num_pairs(self, lengths: Sequence[int]) -> int:
        """Number of pairs of a query and a key that attention computes."""
        return sum(length * (length + 1) // 2 + length * self._num_virtual for length in lengths)


class BatchMeter:
    """Passes batches on and counts their operations, tokens and padding."""

    def __init__(self, batches: Batches, flops: StepFlops) -> None:
        self._batches = batches
        self._flops = flops
        self.num_flops = 0
        """Floating-point operations of all batches so far."""
        self.num_tokens = 0
        self.num_padded_tokens = 0
        """Number of tokens if each batch were padded to its longest example."""
        self.fetch_seconds = 0.0
        """Time that steps spent waiting for batches."""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        batches = iter(self._batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.fetch_seconds += time.perf_counter() - start
            if batch is None:
                return
            self.num_flops += self._flops.of(batch.lengths, batch.num_supervised_tokens)
            self.num_tokens += sum(batch.lengths)
            self.num_padded_tokens += max(batch.lengths) * len(batch.lengths)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position in the data."""
        self._batches.load_state_dict(state)

    def metrics(self, train_seconds: float, peak_flops_per_second: float) -> dict[str, float]:
        """The measurements, by their names in train_results.json; see measure_peak_flops."""
        speed = self.num_flops / train_seconds if train_seconds > 0 else 0.0
        avoided = 1.0 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0
        return {
            "model_flops_per_second": round(speed),
            "peak_flops_per_second": round(peak_flops_per_second),
            "model_flops_utilisation": round(speed / peak_flops_per_second, 4),
            "padding_avoided": round(avoided, 4),
            "data_seconds": round(self.fetch_seconds, 4),
        }


def measure_peak_flops(device: torch.device, dtype: torch.dtype, *, size: int = 2048, repeats: int = 5) -> float:
    """Floating-point operations per second of a product of square matrices [size, size], the best of several."""
    x, weight = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    with torch.no_grad():
        for number in range(repeats + 1):
            _finish(device)
            start = time.perf_counter()
            linear(x, weight)
            _finish(device)
            if number:
                best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_by_kind(trainer: Trainer, peak_memory_bytes: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on this rank, and the rest of the peak (peak_memory_bytes)."""
    learned = trainer.learned.optimized.values()
    sizes = {
        "weights": sum(_held_bytes(p) for p in trainer.model.parameters()),
        "gradients": _gradient_bytes(trainer),
        "optimizer": sum(_state_bytes(trainer.optimizer.state[p]) for p in learned)
        + sum(_held_bytes(master) for master in trainer.learned.masters.values()),
    }
    return {**sizes, "activations and the rest": max(0, peak_memory_bytes - sum(sizes.values()))}


class StepProfiler:
    """Profiles steps 3 to 5, if a run has so many, into a Chrome trace and a table of the most costly operations."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.directory = directory
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "StepProfiler":
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """Tell the profiler that a step has ended."""
        self._profile.step()

    def _write(self, finished: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.directory / TRACE_FILE))
        table = finished.key_averages().table(sort_by=self._sort_by, row_limit=_TABLE_ROWS)
        atomic_write(self.directory / TABLE_FILE, str(table) + "\n")


def _gradient_bytes(trainer: Trainer) -> int:
    """Of fp32, also for weights in half precision. With a fused update the largest of a block's is there at a time, in
    the weight's precision."""
    if not trainer.config.fuses_update:
        return sum(_held_bytes(p) for p in trainer.learned.optimized.values())
    return max(_held_bytes(p) for p in trainer.model.transformer.h.parameters())


def _state_bytes(state: Mapping[str, torch.Tensor]) -> int:
    return sum(_held_bytes(value) for value in state.values() if isinstance(value, torch.Tensor))


def _held_bytes(tensor: torch.Tensor) -> int:
    """Bytes on this rank, while nbytes of FSDP's DTensor is the size of the whole."""
    return own_part(tensor).nbytes


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
