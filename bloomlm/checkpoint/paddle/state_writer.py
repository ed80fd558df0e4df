"""Write .pdparams files, pickles of {name: numpy array}, without holding an array in memory.

Python's pickler wants every array at once; here the few opcodes around each array are spelled out, and its numbers go
from the checkpoint to the file in blocks.

Source: the opcodes as Python's pickletools describes them; the files that PaddleNLP 2.6 wrote.
"""

import pickle
import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from bloomlm.checkpoint.output_directory import Report, no_report
from bloomlm.checkpoint.paddle.state import VARIABLE_NAMES
from bloomlm.checkpoint.safetensors_file import num_bytes, raw_bytes, row_blocks
from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.checkpoint.write_behind import FileBehind

# As numpy spells them; it has no bfloat16, whose bits Paddle keeps as uint16.
NUMPY_DTYPES = {torch.float64: "f8", torch.float32: "f4", torch.float16: "f2", torch.bfloat16: "u2"}


class PaddleStateWriter:
    """One state dict, written array by array; pickle.load gives {name: ndarray}."""

    def __init__(self, file: BinaryIO | FileBehind, report: Report = no_report) -> None:
        """Begin a file.

        Args:
            file: empty, open for writing.
            report: told the number of bytes whenever some more of an array are written.
        """
        self._file, self._report = file, report
        self._memo: list[str] = []
        file.write(pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.MARK)

    def write(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        """Append an array.

        Args:
            name: its key.
            tensor: as stored, of any strides.
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
        """End the file.

        Args:
            variable_names: name of each array -> Paddle's name of its variable ("linear_0.w_0").
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
        """A function or class: by its names the first time, from the memo from then on."""
        if name in self._memo:
            return pickle.BINGET + bytes([self._memo.index(name)])
        self._memo.append(name)
        return _text(module) + _text(name) + pickle.STACK_GLOBAL + pickle.MEMOIZE


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
