"""The formats of models and of other programs' runs; the rest of the package asks here and names no program.

Adapters are found and read by adapters/load.py, which uses this table.
"""

from collections.abc import Callable
from enum import Enum
from pathlib import Path

from bloomlm.checkpoint import huggingface
from bloomlm.checkpoint.paddle import importer
from bloomlm.checkpoint.paddle.importer import VERSION_KEY as FOREIGN_VERSION_KEY
from bloomlm.checkpoint.paddle.importer import (
    ForeignReading,
    ImportedRun,
    PrefixLayout,
    RecordedAdapter,
    read_recorded_adapter,
)
from bloomlm.checkpoint.paddle.importer import adapter_kind as foreign_adapter_kind
from bloomlm.checkpoint.paddle.importer import exported_config as config_of_export
from bloomlm.checkpoint.paddle.importer import find_run as find_foreign_run
from bloomlm.checkpoint.paddle.importer import read_run as read_foreign_run
from bloomlm.checkpoint.paddle.model_writer import bytes_on_ranks, check_degree
from bloomlm.checkpoint.paddle.model_writer import write_paddle_model as write_model_for_ranks
from bloomlm.checkpoint.tensor_reader import TensorReader
from bloomlm.model.config import BloomConfig

__all__ = [
    "FOREIGN_VERSION_KEY",
    "MODEL_FORMATS",
    "READING_OF_WRITTEN_PREFIX",
    "FileForm",
    "ForeignReading",
    "ImportedRun",
    "RecordedAdapter",
    "bytes_on_ranks",
    "check_degree",
    "config_of_export",
    "find_foreign_run",
    "find_model",
    "foreign_adapter_kind",
    "read_foreign_run",
    "read_recorded_adapter",
    "write_model_for_ranks",
]

FindModel = Callable[[Path], bool]
OpenModel = Callable[[Path, BloomConfig], TensorReader]

MODEL_FORMATS: tuple[tuple[FindModel, OpenModel], ...] = (
    (importer.find_model, importer.open_model),  # first: PaddleNLP wrote a model.safetensors of its own
    (huggingface.find_safetensors, huggingface.open_safetensors),
    (huggingface.find_torch, huggingface.open_torch),
)
"""(whether a directory holds the format, open it), in the order in which they are tried."""

READING_OF_WRITTEN_PREFIX = ForeignReading(prefix_layout=PrefixLayout.NEW)
"""How to read a prefix back that was written for ranks, because its files do not record the layout."""


class FileForm(Enum):
    """The format of the files to write."""

    HUGGING_FACE = "hf"
    PADDLE = "paddle"

    @property
    def supports_ranks(self) -> bool:
        """Whether these files can be cut for tensor-parallel ranks; Hugging Face's and PEFT's cannot."""
        return self is FileForm.PADDLE


def find_model(directory: Path) -> bool:
    """Whether a directory holds a model's weights in any format."""
    return any(is_there(directory) for is_there, _ in MODEL_FORMATS)
