"""The state of a run that another program began, under the parameter names of bloomlm's models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.model.bloom import BloomForCausalLM


class RecordedAdapter(Protocol):
    """An adapter that another program began to train, with what PEFT's files cannot say about its further training."""

    @property
    def kind(self) -> str:
        """The flag of finetune that trains such an adapter: "lora" or "prefix_tuning"."""
        ...

    @property
    def flags(self) -> Mapping[str, Any]:
        """Name of a flag of finetune -> its value in the recorded run."""
        ...

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Put it into a model, in the precision of the model; its values are read afterwards.

        Args:
            model: the base model, without an adapter.
            device: where the adapter goes; None: where the model is.

        Raises:
            AdapterError: the model has an adapter already.
        """
        ...

    def describe(self) -> str:
        """A few words about it, for a message."""
        ...

    def write(self, directory: Path) -> None:
        """Record it in a checkpoint that bloomlm writes.

        Raises:
            CheckpointError: it cannot be written.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImportedRun:
    """The state of a run, under the parameter names of the model that resumes it.

    Those are the published names, or lora_A and lora_B of the plain LoRA, or those of a prefix's encoder
    (transformer.prefix.embedding.weight, ...).
    """

    origin: str
    """The program that wrote it."""
    adapter: RecordedAdapter | None
    """What is trained; None: the whole model."""
    weights: Mapping[str, LazyTensor]
    """The trained parameters, as stored."""
    exp_avg: Mapping[str, LazyTensor]
    """AdamW's first moments; empty where the checkpoint has no optimizer state."""
    exp_avg_sq: Mapping[str, LazyTensor]
    """Second moments, of the same names."""
    master_weights: Mapping[str, LazyTensor]
    """fp32 parameters of a run in fp16 or bf16 that kept them; otherwise empty."""
    updates: int
    """Updates made, which AdamW counts for each parameter."""
    step: int
    """Steps done: updates, and steps that fp16 skipped."""
    max_steps: int | None
    """Steps that the run was to have, if the files say."""
    learning_rate: float | None
    """Of the next update, if the files say."""
    loss_scale: float | None
    """Of a run in fp16."""
    losses: tuple[Mapping[str, Any], ...]
    """Entries of the log that hold a training loss."""
