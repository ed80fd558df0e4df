"""One of Paddle's state dicts, whatever form paddle.save gave it.

Tensors come bare or as (name, array); above a gigabyte, pickles of protocol 2 and 3 hold them in flat pieces; beside
them stand their variable names and, in optimizer states, plain values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.checkpoint.paddle.array import EncodedArray, Joined, LazyTensor, Reshaped, StoredArray
from bloomlm.checkpoint.paddle.unpickler import load_paddle_pickle
from bloomlm.errors import CheckpointError

VARIABLE_NAMES = "StructuredToParameterName@@"
BIG_TENSORS = "UnpackBigParamInfor@@"


@dataclass(frozen=True, kw_only=True)
class PaddleState:
    """A state dict, its tensors unread."""

    path: Path
    """The file."""
    tensors: Mapping[str, LazyTensor]
    """Under the names and in the layout of the file."""
    variable_names: Mapping[str, str]
    """Name -> what Paddle called the variable ("linear_0.w_0"), as far as the file says so."""
    values: Mapping[str, Any]
    """Everything else, such as LR_Scheduler and master_weights."""


def read_paddle_state(path: Path) -> PaddleState:
    """Open a state dict; no tensor is read.

    Args:
        path: a .pdparams or .pdopt file.

    Raises:
        CheckpointError: the file is refused or damaged, or holds no state dict.
    """
    content = load_paddle_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dict of named tensors")
    variable_names = _names(path, content.pop(VARIABLE_NAMES, {}))
    big_tensors = content.pop(BIG_TENSORS, {})
    tensors, named = split_tensors(content)
    values = {key: value for key, value in content.items() if key not in tensors}
    for name, pieces in _big_tensors(path, big_tensors).items():
        tensors[name] = _join(path, name, pieces, tensors)
    return PaddleState(path=path, tensors=tensors, variable_names=named | variable_names, values=values)


def split_tensors(content: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a dict, and the variable names of those that stand there as (name, array).

    Args:
        content: key -> tensor, (variable name, tensor), or anything else, which is left out.
    """
    tensors: dict[str, LazyTensor] = {}
    variable_names: dict[str, str] = {}
    for key, value in content.items():
        match value:
            case StoredArray() | EncodedArray():
                tensors[key] = value
            case (str(variable), (StoredArray() | EncodedArray()) as tensor):
                tensors[key] = tensor
                variable_names[key] = variable
    return tensors, variable_names


def _names(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in (*value, *value.values())):
        raise CheckpointError(f"{path}: {VARIABLE_NAMES} is no dict of names; the file is damaged")
    return value


def _big_tensors(path: Path, value: Any) -> dict[str, Mapping[str, Any]]:
    match value:
        case dict() if all(isinstance(pieces, dict) for pieces in value.values()):
            return value
    raise CheckpointError(f"{path}: {BIG_TENSORS} is no dict of tensors in pieces; the file is damaged")


def _join(path: Path, name: str, pieces: Mapping[str, Any], tensors: dict[str, LazyTensor]) -> LazyTensor:
    """Take the flat pieces of a tensor out of the dict and put them together."""
    match pieces:
        case {"OriginShape": list() | tuple() as shape, "slices": list() as keys} if (
            keys and all(type(size) is int and size >= 0 for size in shape) and all(key in tensors for key in keys)
        ):
            flat = Joined(tuple(tensors.pop(key) for key in keys), 0)
        case _:
            raise CheckpointError(f"{path}: pieces of {name} are missing ({pieces}); the file is damaged")
    if any(len(piece.shape) != 1 for piece in flat.pieces) or flat.shape[0] != _count(shape):
        raise CheckpointError(
            f"{path}: the pieces of {name} hold {flat.shape[0]} numbers, its shape {list(shape)} needs {_count(shape)}"
        )
    return Reshaped(flat, tuple(shape))


def _count(shape: Any) -> int:
    return int(math.prod(shape))
