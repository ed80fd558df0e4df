"""Check the index of a torch distributed checkpoint before torch reads it, because torch unpickles it as it is.

A pickle can name any function of Python and let it be called. The index of a training state needs a few descriptions
only, which are listed here; a file that names anything else is refused and nothing in it is run.

Source: the class Metadata and FileSystemWriter of torch.distributed.checkpoint, from torch 2.6 to 2.13.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from bloomlm.errors import CheckpointError

INDEX_FILE = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_DESCRIPTIONS = {
    *((_METADATA, name) for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *((_METADATA, name) for name in ("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # name of a memory layout -> the layout
    ("torch", "Size"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
}


def check_index(directory: Path) -> None:
    """Refuse the index of a distributed checkpoint that is damaged or is more than an index of tensors.

    Args:
        directory: the distributed checkpoint.

    Raises:
        CheckpointError: it cannot be read, names other objects, or names files outside of the directory.
    """
    path = directory / INDEX_FILE
    try:
        with path.open("rb") as file:
            index = _DescriptionUnpickler(file).load()
        problem = _problem_of(index)
    except Exception as error:  # an unpickler raises errors of every kind
        raise CheckpointError(
            f"{path} is damaged or is no index of tensors: {type(error).__name__}: {error}; resume from another "
            "checkpoint"
        ) from error
    if problem:
        raise CheckpointError(f"{path} {problem}; resume from another checkpoint")


class _DescriptionUnpickler(pickle.Unpickler):
    """Knows the names of descriptions and of dtypes only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The object that a pickle names."""
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and (module_name, global_name) not in _DESCRIPTIONS:
            raise pickle.UnpicklingError(
                f"it asks for the Python object {module_name}.{global_name}, which an index does not need and which "
                "could run anything; it was refused and nothing was run"
            )
        return super().find_class(module_name, global_name)


def _problem_of(index: object) -> str | None:
    """What is wrong with the content of an index; None if nothing is."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        return f"holds a {type(index).__name__}; expected the index of a distributed checkpoint"
    # torch unpickles values of any other kind without a check
    others = [name for name, kind in index.state_dict_metadata.items() if not isinstance(kind, TensorStorageMetadata)]
    if others:
        return f"has entries that are no tensors: {others[0]!r}"
    outside = {place.relative_path for place in index.storage_data.values()}
    outside = {name for name in outside if Path(name).name != name}
    return f"names a file outside of its directory: {min(outside)!r}" if outside else None
