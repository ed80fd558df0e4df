"""Stand-ins for the six Python objects that Paddle's pickles name: the results of calling them and setting their state.

Source: numpy's ndarray.__reduce__ and dtype.__reduce__; the pickler's form of bytes in protocol 2 and 3; paddle.save.
"""

import math
from enum import Enum
from typing import Any, Final

import torch

from bloomlm.checkpoint.paddle.lazy import StoredFile, encoded_array, stored_array
from bloomlm.checkpoint.tensor_reader import LazyTensor

MAX_DIMENSIONS = 32  # numpy's own limit when these files were written
# Arrays in (name, array) tuples in a dict in a dict take 4.
MAX_DEPTH = 8
MAX_TUPLE_ITEMS = 16  # Paddle makes pairs; a file could ask for a million copies of a million items


class Global(Enum):
    """A global that a pickle may name."""

    RECONSTRUCT = "numpy.core.multiarray._reconstruct"
    NDARRAY = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ORDERED_DICT = "collections.OrderedDict"
    TUPLE = "builtins.tuple"
    ENCODE = "_codecs.encode"


GLOBALS: Final = {
    ("numpy.core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): Global.RECONSTRUCT,
    ("numpy", "ndarray"): Global.NDARRAY,
    ("numpy", "dtype"): Global.DTYPE,
    ("collections", "OrderedDict"): Global.ORDERED_DICT,
    ("builtins", "tuple"): Global.TUPLE,
    ("__builtin__", "tuple"): Global.TUPLE,
    ("_codecs", "encode"): Global.ENCODE,
}

# Paddle stores bfloat16 as numpy's uint16 and has no uint16 tensors of its own.
DTYPES: Final = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "u2": torch.bfloat16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "b1": torch.bool,
}


class Span:
    """Offset and number of bytes in the file."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset, self.length = offset, length


class Text(str):
    """A short text with its place in the file, because it may encode the bytes of an array."""

    span: Span


class EncodedSpan(Span):
    """Bytes encoded as text: each is a Latin-1 character in UTF-8."""


class DType:
    """numpy.dtype: a code such as "f4"; the state that follows has its byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.is_built = False


class NdArray:
    """numpy.ndarray: empty until its state follows."""

    def __init__(self) -> None:
        self.array: LazyTensor | None = None


def call(function: object, arguments: object) -> Any:
    """The result of calling a stand-in.

    Raises:
        ValueError: it is not a stand-in, or is called in a way that Paddle's files do not use.
    """
    if not isinstance(arguments, tuple):
        raise ValueError("the arguments of a call are not a tuple")
    match function, arguments:
        case Global.RECONSTRUCT, (Global.NDARRAY, tuple(), Span() | Text()):
            return NdArray()
        case Global.DTYPE, (str(code), bool() | int(), bool() | int()):
            if code not in DTYPES:
                raise ValueError(f"an array of numpy type {str(code)!r}; expected one of {', '.join(DTYPES)}")
            return DType(code)
        case Global.ORDERED_DICT, ():
            return {}
        case Global.TUPLE, (list() | tuple() as items,) if len(items) <= MAX_TUPLE_ITEMS:
            return tuple(items)
        case Global.ENCODE, (Span() | Text() as text, "latin1" | "latin-1"):
            span = text.span if isinstance(text, Text) else text
            return EncodedSpan(span.offset, span.length)
    name = function.value if isinstance(function, Global) else f"a {type(function).__name__}"
    raise ValueError(f"{name} is called in a way that numpy and Paddle do not call it")


def set_state(target: object, state: object, stored: StoredFile) -> None:
    """Give a numpy stand-in the state that follows it in the pickle.

    Raises:
        ValueError: the state is invalid, or bytes and shape do not agree.
    """
    match target, state:
        case DType(), (int(), str(order), None, None, None, int(), int(), int()):
            if order not in ("<", "|", "="):
                raise ValueError(f"an array with byte order {str(order)!r}; expected little endian, '<'")
            target.is_built = True
        case NdArray(array=None), (
            int(),
            tuple(shape),
            DType(is_built=True) as dtype,
            bool() | int() as order,
            Span() as span,
        ):
            target.array = _place(shape, DTYPES[dtype.code], bool(order), span, stored)
        case _:
            raise ValueError(f"a state that does not fit a {type(target).__name__}")


def plain_value(value: Any) -> Any:
    """A value of a pickle as plain types, with lazy tensors in place of the stand-ins.

    Raises:
        ValueError: a stand-in is left that is not a value, or values are nested too deeply.
    """
    return _plain(value, {}, 0)


def _plain(value: Any, done: dict[int, Any], depth: int) -> Any:
    """As plain_value; `done` maps the id of each value that was converted before to its result."""
    if depth > MAX_DEPTH:
        raise ValueError(f"values are nested deeper than {MAX_DEPTH} levels, or inside themselves")
    if isinstance(value, Text):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if id(value) in done:
        return done[id(value)]
    result: Any
    if isinstance(value, NdArray) and value.array is not None:
        result = value.array
    elif isinstance(value, dict):
        result = {
            str(key) if isinstance(key, str) else key: _plain(item, done, depth + 1) for key, item in value.items()
        }
    elif isinstance(value, (list, tuple)):
        result = type(value)(_plain(item, done, depth + 1) for item in value)
    else:
        raise ValueError(f"a {type(value).__name__} stands where a value is expected")
    done[id(value)] = result
    return result


def _place(
    shape: tuple[Any, ...], dtype: torch.dtype, fortran_order: bool, span: Span, stored: StoredFile
) -> LazyTensor:
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"an array of shape {list(shape[: MAX_DIMENSIONS + 1])}, which is not valid")
    needed = math.prod(shape) * dtype.itemsize
    # a Latin-1 character takes one or two bytes in UTF-8
    longest = 2 * needed if isinstance(span, EncodedSpan) else needed
    if not needed <= span.length <= longest:
        raise ValueError(f"an array of shape {list(shape)} ({dtype}) needs {needed} bytes and has {span.length}")
    if isinstance(span, EncodedSpan):
        return encoded_array(stored, span.offset, span.length, shape, dtype, fortran_order=fortran_order)
    return stored_array(stored, span.offset, shape, dtype, fortran_order=fortran_order)
