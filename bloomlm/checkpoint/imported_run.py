"""A run that another program began, as ordinary state: what its checkpoint holds, under the names of the model here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.model.bloom import BloomForCausalLM


class RecordedAdapter(Protocol):
    """An adapter as another program began it, with what PEFT's files cannot say about how it learns on."""

    @property
    def kind(self) -> str:
        """The flag that lets such an adapter learn: "lora" or "prefix_tuning"."""
        ...

    @property
    def flags(self) -> Mapping[str, Any]:
        """Name of a flag of finetune -> the value with which the adapter was begun."""
        ...

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Put it into a model, in the precision of the model; the values are yet to come.

        Args:
            model: the base model, without an adapter.
            device: where the adapter goes; None: where the model is.

        Raises:
            AdapterError: the model has an adapter already.
        """
        ...

    def describe(self) -> str:
        """What it is, in a few words."""
        ...

    def write(self, directory: Path) -> None:
        """Note it in a checkpoint of ours.

        Raises:
            CheckpointError: it cannot be written.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImportedRun:
    """The state of a run, under the parameter names of the model that goes on.

    Those are the published names; lora_A and lora_B of the plain LoRA; transformer.prefix.embedding.weight and so on of
    a prefix's encoder.
    """

    origin: str
    """The program that wrote it."""
    adapter: RecordedAdapter | None
    """What learns; None: all of the model."""
    weights: Mapping[str, LazyTensor]
    """What learns, as stored."""
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
