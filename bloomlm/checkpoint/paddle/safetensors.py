"""The safetensors files of PaddleNLP 2.6: metadata format "np", linears stored (in, out), bfloat16 as uint16.

Source: the format, https://github.com/huggingface/safetensors#format.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bloomlm.checkpoint.paddle.layout import PADDLE_PREFIX
from bloomlm.checkpoint.paddle.stored import StoredArray, StoredFile
from bloomlm.checkpoint.safetensors_file import DTYPES, LENGTH_BYTES, MAX_HEADER_BYTES
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError

PADDLE_FORMATS = ("np", "pd")
STORED_DTYPES: Mapping[str, torch.dtype] = DTYPES | {"U16": torch.bfloat16}  # numpy has no bfloat16


def is_paddle_safetensors(path: Path) -> bool:
    """Whether PaddleNLP wrote a safetensors file; False for a damaged one, which the other reader reports."""
    try:
        header = _read_header(StoredFile(path))
    except CheckpointError:
        return False
    return header.get("__metadata__", {}).get("format") in PADDLE_FORMATS or any(
        name.startswith(PADDLE_PREFIX) for name in header
    )


def open_paddle_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file, as stored; none is read.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is cut short or damaged.
    """
    stored = StoredFile(path)
    header = _read_header(stored)
    header.pop("__metadata__", None)
    data_start = stored.size_bytes - max((int(values["data_offsets"][1]) for values in header.values()), default=0)
    return {name: _place(stored, name, values, data_start) for name, values in header.items()}


def _place(stored: StoredFile, name: str, values: Any, data_start: int) -> StoredArray:
    try:
        shape, dtype = tuple(int(size) for size in values["shape"]), STORED_DTYPES[values["dtype"]]
        start, stop = (int(offset) for offset in values["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{stored.path}: the header's entry for {name} makes no sense: {error!r}") from error
    if min(shape, default=0) < 0 or start < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{stored.path}: {name} of shape {list(shape)} ({dtype}) has {stop - start} bytes; the file is damaged"
        )
    return StoredArray(stored, data_start + start, shape, dtype)


def _read_header(stored: StoredFile) -> dict[str, Any]:
    prefix = bytearray(LENGTH_BYTES)
    stored.read_into(memoryview(prefix), 0)
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER_BYTES, stored.size_bytes - LENGTH_BYTES):
        raise CheckpointError(f"{stored.path} is cut short or no safetensors file; fetch it again")
    text = bytearray(length)
    stored.read_into(memoryview(text), LENGTH_BYTES)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{stored.path} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or not all(isinstance(values, dict) for values in header.values()):
        raise CheckpointError(f"{stored.path} is no safetensors file: its header is no object of objects")
    promised = _promised_bytes(stored, header)
    if stored.size_bytes != LENGTH_BYTES + length + promised:
        raise CheckpointError(
            f"{stored.path} holds {stored.size_bytes} bytes, its header promises {LENGTH_BYTES + length + promised}: "
            "cut short or damaged; fetch it again"
        )
    return header


def _promised_bytes(stored: StoredFile, header: Mapping[str, Any]) -> int:
    try:
        return max((int(v["data_offsets"][1]) for name, v in header.items() if name != "__metadata__"), default=0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{stored.path}: its header has an entry without data_offsets: {error!r}") from error
