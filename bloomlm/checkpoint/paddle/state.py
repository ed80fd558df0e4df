"""Paddle's state dicts (.pdparams, .pdopt): reading each form that paddle.save wrote, and writing array by array.

Tensors are arrays or pairs (name, array); pickles of protocol 2 and 3 hold those above a gigabyte in flat pieces. The
dict also holds variable names and, in optimizer states, plain values. Python's pickler needs whole arrays in memory, so
the writer emits the opcodes around each array itself and writes the numbers in blocks.

Source: the opcodes as Python's pickletools describes them; the files that PaddleNLP 2.6 wrote.
"""

import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bloomlm.checkpoint.output import FileBehind, Report, no_report
from bloomlm.checkpoint.paddle.lazy import joined, reshaped
from bloomlm.checkpoint.paddle.unpickler import load_paddle_pickle
from bloomlm.checkpoint.safetensors_file import num_bytes, raw_bytes, row_blocks
from bloomlm.checkpoint.tensor_reader import LazyTensor, TensorEntry
from bloomlm.errors import CheckpointError

VARIABLE_NAMES = "StructuredToParameterName@@"
BIG_TENSORS = "UnpackBigParamInfor@@"
# numpy's codes; it has no bfloat16, whose bits Paddle stores as uint16.
NUMPY_DTYPES = {torch.float64: "f8", torch.float32: "f4", torch.float16: "f2", torch.bfloat16: "u2"}


@dataclass(frozen=True, kw_only=True)
class PaddleState:
    """A state dict, its tensors unread."""

    path: Path
    """The file."""
    tensors: Mapping[str, LazyTensor]
    """Name -> tensor, as in the file."""
    variable_names: Mapping[str, str]
    """Name -> name of the Paddle variable ("linear_0.w_0"); empty if the file does not record them."""
    values: Mapping[str, Any]
    """Everything else, such as LR_Scheduler and master_weights."""


def read_paddle_state(path: Path) -> PaddleState:
    """Open a state dict; no tensor is read.

    Args:
        path: a .pdparams or .pdopt file.

    Raises:
        CheckpointError: the file is damaged, holds no state dict, or holds objects that a state dict does not need.
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
    """The tensors of a dict, and the variable names of those that it holds as (name, array).

    Args:
        content: key -> tensor, (variable name, tensor), or anything else, which is left out.
    """
    tensors: dict[str, LazyTensor] = {}
    variable_names: dict[str, str] = {}
    for key, value in content.items():
        match value:
            case LazyTensor():
                tensors[key] = value
            case (str(variable), LazyTensor() as tensor):
                tensors[key] = tensor
                variable_names[key] = variable
    return tensors, variable_names


class PaddleStateWriter:
    """A state dict that is written array by array; pickle.load reads it as {name: ndarray}."""

    def __init__(self, file: BinaryIO | FileBehind, report: Report = no_report) -> None:
        """Begin a file.

        Args:
            file: empty, open for writing.
            report: called with a number of bytes after each write of a part of an array.
        """
        self._file, self._report = file, report
        self._memo: list[str] = []
        file.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK)

    def write(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Append an array.

        Args:
            name: its key.
            tensor: the array in the orientation to be stored; it may have any strides.
            dtype: precision to write.
        """
        entry = TensorEntry(tuple(tensor.shape), dtype)
        size_bytes = num_bytes(entry)
        empty = pickle.BININT1 + b"\0" + pickle.TUPLE1 + pickle.SHORT_BINBYTES + b"\x01b" + pickle.TUPLE3
        self._file.write(
            _text(name)
            + (self._global("numpy.core.multiarray", "_reconstruct") + self._global("numpy", "ndarray"))
            + (empty + pickle.REDUCE)
            + (pickle.MARK + _number(1) + _tuple(*(_number(size) for size in entry.shape)))
            + (self._dtype(NUMPY_DTYPES[entry.dtype]) + pickle.NEWFALSE)
            + (pickle.BINBYTES + struct.pack("<I", size_bytes) if size_bytes < 2**32 else b"")
            + (pickle.BINBYTES8 + struct.pack("<Q", size_bytes) if size_bytes >= 2**32 else b"")
        )
        written = 0
        for block in row_blocks(tensor, dtype):
            block_bytes = self._file.write(raw_bytes(block))
            self._report(block_bytes)
            written += block_bytes
        assert written == size_bytes, (name, written, size_bytes)
        self._file.write(pickle.TUPLE + pickle.BUILD)

    def finish(self, variable_names: Mapping[str, str]) -> None:
        """Complete the file.

        Args:
            variable_names: name of each array -> name of its Paddle variable ("linear_0.w_0").
        """
        names = b"".join(_text(name) + _text(variable) for name, variable in variable_names.items())
        self._file.write(_text(VARIABLE_NAMES) + pickle.EMPTY_DICT + pickle.MARK + names + pickle.SETITEMS)
        self._file.write(pickle.SETITEMS + pickle.STOP)

    def _dtype(self, name: str) -> bytes:
        """numpy.dtype(name, False, True) with the state of a little-endian plain type."""
        arguments = _text(name) + pickle.NEWFALSE + pickle.NEWTRUE + pickle.TUPLE3
        state = [_number(3), _text("<"), *(3 * [pickle.NONE]), _number(-1), _number(-1), _number(0)]
        return self._global("numpy", "dtype") + arguments + pickle.REDUCE + _tuple(*state) + pickle.BUILD

    def _global(self, module: str, name: str) -> bytes:
        """A function or class: by its names the first time, afterwards from the memo."""
        if name in self._memo:
            return pickle.BINGET + bytes([self._memo.index(name)])
        self._memo.append(name)
        return _text(module) + _text(name) + pickle.STACK_GLOBAL + pickle.MEMOIZE


def _names(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in (*value, *value.values())):
        raise CheckpointError(f"{path} is damaged: {VARIABLE_NAMES} is not a dict of names; fetch it again")
    return value


def _big_tensors(path: Path, value: Any) -> dict[str, Mapping[str, Any]]:
    match value:
        case dict() if all(isinstance(pieces, dict) for pieces in value.values()):
            return value
    raise CheckpointError(f"{path} is damaged: {BIG_TENSORS} is not a dict of tensors in pieces; fetch it again")


def _join(path: Path, name: str, pieces: Mapping[str, Any], tensors: dict[str, LazyTensor]) -> LazyTensor:
    """Remove the flat pieces of a tensor from the dict and join them."""
    match pieces:
        case {"OriginShape": list() | tuple() as shape, "slices": list() as keys} if (
            keys and all(type(size) is int and size >= 0 for size in shape) and all(key in tensors for key in keys)
        ):
            found = [tensors.pop(key) for key in keys]
        case _:
            raise CheckpointError(f"{path} is damaged: pieces of {name} are missing ({pieces}); fetch it again")
    counts = [math.prod(piece.shape) for piece in found]
    if any(len(piece.shape) != 1 for piece in found) or sum(counts) != math.prod(shape):
        raise CheckpointError(
            f"{path} is damaged: {name} of shape {list(shape)} needs {math.prod(shape)} numbers, and its pieces hold "
            f"{sum(counts)}; fetch it again"
        )
    return reshaped(joined(found, 0), tuple(shape))


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) < 256:
        return pickle.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _number(value: int) -> bytes:
    if 0 <= value < 2**8:
        return pickle.BININT1 + bytes([value])
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
