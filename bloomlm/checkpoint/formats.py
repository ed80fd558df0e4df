"""Whose files a model or a run may lie in: what the rest of the package asks instead of naming other programs.

Adapters are found and read by adapters/load.py, which stands above this table.
"""

from collections.abc import Callable
from pathlib import Path

from bloomlm.checkpoint import huggingface
from bloomlm.checkpoint.paddle import importer
from bloomlm.checkpoint.paddle.importer import CONFIG_KEYS as FOREIGN_CONFIG_KEYS
from bloomlm.checkpoint.paddle.importer import PaddleReading, read_recorded_adapter
from bloomlm.checkpoint.paddle.importer import adapter_kind as foreign_adapter_kind
from bloomlm.checkpoint.paddle.importer import exported_config as config_of_export
from bloomlm.checkpoint.paddle.importer import find_run as find_foreign_run
from bloomlm.checkpoint.paddle.importer import read_run as read_foreign_run
from bloomlm.checkpoint.tensor_reader import TensorReader
from bloomlm.model.config import BloomConfig

__all__ = [
    "FOREIGN_CONFIG_KEYS",
    "MODEL_FORMATS",
    "config_of_export",
    "find_foreign_run",
    "find_model",
    "foreign_adapter_kind",
    "read_foreign_run",
    "read_recorded_adapter",
    "reading_from_flags",
]

FindModel = Callable[[Path], bool]
OpenModel = Callable[[Path, BloomConfig], TensorReader]

MODEL_FORMATS: tuple[tuple[FindModel, OpenModel], ...] = (
    (importer.find_model, importer.open_model),  # first: PaddleNLP wrote a model.safetensors of its own
    (huggingface.find_safetensors, huggingface.open_safetensors),
    (huggingface.find_torch, huggingface.open_torch),
)
"""(is it there?, open it), asked in this order."""

reading_from_flags = PaddleReading.from_flags
"""How the files of another program are to be read, from the flags that say so."""


def find_model(directory: Path) -> bool:
    """Whether a directory holds a model's weights, in whatever format."""
    return any(is_there(directory) for is_there, _ in MODEL_FORMATS)
