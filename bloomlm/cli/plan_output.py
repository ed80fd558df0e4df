"""The result of `bloomlm plan`, printed as tables or written as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bloomlm.errors import format_bytes
from bloomlm.files.atomic import atomic_write
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.plan import PredictionMemory, TrainingMemory
from bloomlm.parallel.traffic import StepTime, Traffic

FORMAT_VERSION = 1
_LEAST_SHOWN_BYTES = 1000  # the table leaves out smaller traffic; the JSON has all

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "rounded": "16-bit copy of a weight",
    "gathered": "weights gathered by FSDP",
    "loss": "the loss's logits, the head's gradient",
    "kv_cache": "KV cache",
    "peak": "peak",
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The largest batches for the memory of one kind of device."""

    gigabytes: int
    """Memory of the device in 10^9 bytes; real devices have a few per cent more, for CUDA, NCCL and the allocator."""
    largest_train_batch_size: int
    """Examples in a microbatch; 0: training does not fit."""
    largest_batch_size: int
    """Sequences generated at once; 0: prediction does not fit."""


@dataclass(frozen=True, kw_only=True)
class ReferencePass:
    """The log-probabilities of all answers under the reference model, before the first step."""

    peak: int
    """Memory of a process, in bytes."""
    seconds_a_step: float
    """Time for the examples of one step, if it is all products."""
    disk_bytes_an_example: int = 16
    """What is kept in the cache directory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is computed about a job."""

    model: str
    num_parameters: int
    num_learned_parameters: int
    degrees: Degrees
    training_dtype: str
    """Dtype of the matrix products in training."""
    weights_dtype: str
    """Dtype of the weights in training."""
    prediction_dtype: str
    num_step_tokens: int
    """Tokens of a step on all copies of the model."""
    num_rank_tokens: int
    """Tokens of a step on one copy of the model."""
    batch_size: int
    """Sequences generated at once."""
    num_cached_tokens: int
    """Tokens of each of these sequences, the generated ones included."""
    training: TrainingMemory
    prediction: PredictionMemory
    fits: Sequence[Fit]
    traffic: Sequence[Traffic]
    time: StepTime
    reference: ReferencePass | None
    """None: the objective has no reference."""


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan as tables."""
    processes = plan.degrees.world_size
    ranks = "1 process" if processes == 1 else f"{processes} processes: {plan.degrees}"
    console.print(
        f"{plan.model}: {plan.num_parameters:,} parameters, {plan.num_learned_parameters:,} learn; {ranks}\n"
        f"training: {plan.num_step_tokens:,} tokens a step, products in {plan.training_dtype}, weights in "
        f"{plan.weights_dtype}\n"
        f"prediction: {plan.batch_size} x {plan.num_cached_tokens:,} tokens, {plan.prediction_dtype}",
        soft_wrap=True,
    )
    console.print(_memory_table(plan))
    console.print(_fit_table(plan))
    if plan.traffic:
        console.print(_traffic_table(plan))
    console.print(_time_line(plan), soft_wrap=True)
    if plan.reference is not None:
        console.print(
            f"Before the first step, the reference model scores all answers: {plan.reference.seconds_a_step:.3g} s for "
            f"the examples of a step, {format_bytes(plan.reference.peak)} of memory, "
            f"{plan.reference.disk_bytes_an_example} bytes of disk for each example",
            soft_wrap=True,
        )


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON, with all sizes in bytes and times in seconds.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content: dict[str, Any] = {"bloomlm_plan": FORMAT_VERSION, **dataclasses.asdict(plan)}
    content["training"]["peak"] = plan.training.peak
    content["prediction"]["peak"] = plan.prediction.peak
    for item, written in zip(plan.traffic, content["traffic"], strict=True):
        written |= {"sent_bytes": item.sent_bytes, "least_sent_bytes": item.least_sent_bytes}
    content["time"] |= {"shortest": plan.time.shortest, "longest": plan.time.longest}
    atomic_write(path, json.dumps(content, indent=2) + "\n")


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a process", title_justify="left")
    table.add_column("")
    table.add_column("training", justify="right")
    table.add_column("prediction", justify="right")
    for kind, shown in _KINDS.items():
        sizes = [getattr(memory, kind, 0) for memory in (plan.training, plan.prediction)]
        if any(sizes):
            table.add_row(shown, *(format_bytes(count) if count else "" for count in sizes), end_section=kind == "loss")
    return table


def _fit_table(plan: Plan) -> Table:
    table = Table(title="What fits", title_justify="left")
    table.add_column("device", justify="right")
    table.add_column("training", justify="right")
    table.add_column("prediction", justify="right")
    for fit in plan.fits:
        batches = (fit.largest_train_batch_size, fit.largest_batch_size)
        table.add_row(f"{fit.gigabytes} GB", *(f"batches of {most:,}" if most else "no" for most in batches))
    return table


def _traffic_table(plan: Plan) -> Table:
    table = Table(title="Sent by a process in a step", title_justify="left")
    for name in ("", "operation", "ranks", "bytes", "a token", "x the least"):
        table.add_column(name, justify="left" if name in ("", "operation") else "right", no_wrap=True)
    for item in plan.traffic:
        if item.sent_bytes < _LEAST_SHOWN_BYTES:
            continue
        _add_traffic(table, item.what, item.operation, str(item.num_ranks), [item], plan.num_rank_tokens)
    table.add_section()
    _add_traffic(table, "all", "", "", plan.traffic, plan.num_rank_tokens)
    return table


def _add_traffic(
    table: Table, what: str, operation: str, num_ranks: str, items: Sequence[Traffic], num_tokens: int
) -> None:
    sent, least = sum(item.sent_bytes for item in items), sum(item.least_sent_bytes for item in items)
    ratio = f"{sent / least:.3f}" if least else ""
    table.add_row(what, operation, num_ranks, format_bytes(sent), format_bytes(sent / num_tokens), ratio)


def _time_line(plan: Plan) -> str:
    time = plan.time
    parts = [f"products {time.computing:.3g} s"]
    if time.tensor_parallelism:
        parts.append(f"tensor parallelism {time.tensor_parallelism:.3g} s")
    if time.data_parallelism:
        parts.append(f"data parallelism {time.data_parallelism:.3g} s")
    lines = [f"A step at these speeds: {', '.join(parts)}"]
    if len(parts) == 1:
        return f"{lines[0]}, {plan.num_step_tokens / time.computing:,.0f} tokens/s"
    for how, seconds in (("all overlapped that can be", time.shortest), ("nothing overlapped", time.longest)):
        lines.append(f"  {how}: {seconds:.3g} s, {plan.num_step_tokens / seconds:,.0f} tokens/s")
    return "\n".join(lines)
