"""The public interface of this package: it recognises PaddleNLP's files, and returns their content as ordinary state.

A model becomes a TensorReader under published names, an adapter a plain LoRA or prefix, a run an ImportedRun. Paddle is
not needed, and no code in a file is executed. Other code imports only this module and the two writers.
"""

from pathlib import Path

from bloomlm.checkpoint.adapters.base_config import base_config, lora_base_config
from bloomlm.checkpoint.adapters.peft import PlainAdapter, read_adapter_config
from bloomlm.checkpoint.paddle.adapter_files import (
    AS_THE_FILES_TELL,
    LORA_CONFIG_FILE,
    LORA_STEM,
    PREFIX_CONFIG_FILE,
    ForeignReading,
    PrefixLayout,
    read_adapter_files,
)
from bloomlm.checkpoint.paddle.lora import PaddleLora, read_paddle_lora
from bloomlm.checkpoint.paddle.model import exported_config, find_model, open_model
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix, read_paddle_prefix
from bloomlm.checkpoint.paddle.recorded import RecordedAdapter, RecordedLora, RecordedPrefix, read_recorded_adapter
from bloomlm.checkpoint.paddle.run import ImportedRun, WholeModel, find_run, read_state
from bloomlm.errors import AdapterError
from bloomlm.model.config import BloomConfig

__all__ = [
    "AS_THE_FILES_TELL",
    "VERSION_KEY",
    "ForeignReading",
    "ImportedRun",
    "PrefixLayout",
    "RecordedAdapter",
    "adapter_base_config",
    "adapter_kind",
    "exported_config",
    "find_adapter",
    "find_model",
    "find_run",
    "open_adapter",
    "open_model",
    "read_adapter",
    "read_recorded_adapter",
    "read_run",
]
VERSION_KEY = "paddlenlp_version"
"""Key of config.json for the version of PaddleNLP that wrote it."""


def find_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PaddleNLP's files."""
    return any((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))


def adapter_kind(directory: Path) -> str | None:
    """The flag of finetune for the kind of adapter in a directory: "lora", "prefix_tuning", or None without one."""
    kinds = {LORA_CONFIG_FILE: RecordedLora.kind, PREFIX_CONFIG_FILE: RecordedPrefix.kind}
    return next((kind for name, kind in kinds.items() if (directory / name).is_file()), None)


def read_adapter(
    directory: Path, model_config: BloomConfig, reading: ForeignReading = AS_THE_FILES_TELL
) -> PlainAdapter:
    """Read an adapter as the ordinary LoRA or prefix that computes the same.

    Args:
        directory: the adapter.
        model_config: configuration of the base model.
        reading: what the files do not record.

    Raises:
        AdapterError: there is no adapter or one of each kind, or its files are missing or damaged, do not fit the model
            or do not record how they are to be read.
    """
    return open_adapter(directory, model_config, reading).plain()


def open_adapter(
    directory: Path, model_config: BloomConfig, reading: ForeignReading = AS_THE_FILES_TELL
) -> PaddleLora | PaddlePrefix:
    """Interpret an adapter's files without reading a tensor; arguments and errors as in read_adapter."""
    is_lora, is_prefix = ((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))
    if is_lora == is_prefix:
        found = "both" if is_lora else "neither"
        raise AdapterError(f"{directory}: expected {LORA_CONFIG_FILE} or {PREFIX_CONFIG_FILE}, found {found}")
    if is_prefix:
        return read_paddle_prefix(directory, model_config, reading)
    if reading.prefix_layout is not None:
        raise AdapterError(f"{directory} holds a LoRA adapter, to which prefix_layout does not apply; leave it out")
    return read_paddle_lora(directory, model_config, reading)


def adapter_base_config(directory: Path) -> BloomConfig:
    """The shape of an adapter's base model; see adapters/base_config.py.

    Raises:
        AdapterError: files are missing or damaged, or do not record it.
    """
    if (directory / PREFIX_CONFIG_FILE).is_file():
        values = read_adapter_config(directory / PREFIX_CONFIG_FILE)
        return base_config(directory, values, "num_hidden_layers", "hidden_size", "num_attention_heads")
    files = read_adapter_files(directory, LORA_CONFIG_FILE, LORA_STEM)
    inputs = {name: tensor.shape[0] for name, tensor in files.states[0].tensors.items() if tensor.shape}
    return lora_base_config(directory, inputs, num_ranks=len(files.states))


def read_run(
    directory: Path,
    model_config: BloomConfig,
    *,
    adam_beta1: float = 0.9,
    reading: ForeignReading = AS_THE_FILES_TELL,
) -> ImportedRun:
    """Read the state of a run; the tensors of a whole model stay unread.

    Args:
        directory: a checkpoint-N: the weights (or the adapter), and optimizer.pdopt.
        model_config: configuration of the model, or of an adapter's base model.
        adam_beta1: the run's beta1; used only where no file records the number of steps.
        reading: what an adapter's files do not record.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the weights.
    """
    if find_adapter(directory):
        return read_state(directory, open_adapter(directory, model_config, reading), adam_beta1)
    return read_state(directory, WholeModel(directory, model_config), adam_beta1)
