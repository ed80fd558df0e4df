"""checkpoint-N of a run: what it learned, its tokenizer, its log and everything needed to resume."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from bloomlm.adapters.base import adapter_of
from bloomlm.checkpoint.adapters.peft import gather_adapter, save_adapter
from bloomlm.checkpoint.imported_run import RecordedAdapter
from bloomlm.checkpoint.main_rank import one_directory
from bloomlm.checkpoint.reader import open_reader, read_config
from bloomlm.checkpoint.training_state import (
    checkpoint_directory,
    checkpoint_path,
    load_training_state,
    prune_checkpoints,
    save_training_state,
)
from bloomlm.checkpoint.writer import write_model
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.parallel.layout import own_bounds
from bloomlm.training.history import History
from bloomlm.training.run_plan import OutputPlan
from bloomlm.training.step import Trainer


class CheckpointWriter:
    """Writes a run's checkpoints.

    Args:
        trainer: the run.
        tokenizer: written beside the weights.
        history: written too; knows the best checkpoint.
        output: where they go, and how many are kept.
        base_model: the model that an adapter belongs to.
        structure: an adapter that another program began, noted in checkpoints; None: the run's flags describe it.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Tokenizer,
        history: History,
        output: OutputPlan,
        *,
        base_model: str,
        structure: RecordedAdapter | None = None,
    ) -> None:
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._history = history
        self._output = output
        self._base_model = base_model
        self._structure = structure

    def save(self, step: int) -> None:
        """Write checkpoint-STEP, then remove those beyond the limit, but never the best if the run ends with it.

        Raises:
            CheckpointError: it cannot be written; older ones are untouched.
        """
        mesh, output = self._trainer.mesh, self._output
        with one_directory(checkpoint_directory(output.directory, step), mesh) as directory:
            self.write_learned(directory)
            if self._structure is not None:
                self._structure.write(directory)
            save_training_state(directory, *self._trainer.state(), mesh=mesh)
            if mesh.is_main:
                self._history.write(directory)
        if output.save_total_limit is not None and mesh.is_main:
            best = self._history.best_model_checkpoint if output.ends_with_best else None
            kept = None if best is None else output.directory / best
            prune_checkpoints(output.directory, output.save_total_limit, kept)

    def write_learned(self, directory: Path) -> None:
        """Write the whole model, or its adapter, and the tokenizer into a directory; every rank must call this."""
        model, mesh = self._trainer.model, self._trainer.mesh
        if adapter_of(model) is None:
            write_model(
                directory,
                model.config,
                model.named_parameters(),
                max_shard_size_bytes=self._output.max_shard_size_bytes,
                mesh=mesh,
            )
        else:
            whole = model if mesh.is_alone else gather_adapter(model, mesh)
            if mesh.is_main:
                save_adapter(whole, directory, self._base_model)
        if mesh.is_main:
            self._tokenizer.save(directory)

    def restore(self, step: int) -> None:
        """Go back to a checkpoint of this run."""
        restore(self._trainer, checkpoint_path(self._output.directory, step))


def restore(trainer: Trainer, checkpoint: Path) -> None:
    """Bring a trainer to the state in which a checkpoint was written.

    Args:
        trainer: of the same model, adapter, precision, data and seed.
        checkpoint: complete.

    Raises:
        CheckpointError, TrainingError: it does not fit.
    """
    if adapter_of(trainer.model) is None:
        _read_weights(trainer, checkpoint)
    tensors, _ = trainer.state()
    trainer.load_state(tensors, load_training_state(checkpoint, tensors))


def _read_weights(trainer: Trainer, checkpoint: Path) -> None:
    reader = open_reader(checkpoint, read_config(checkpoint))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            own.copy_(reader.read_box(name, own_bounds(name, parameter, trainer.mesh)))
