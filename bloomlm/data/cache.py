"""A cache of named arrays on disk: safetensors files, written atomically and mapped into memory when read.

The header of a file holds a checksum of its arrays. A file that cannot be read or written causes a warning and never
stops a run: the caller computes the arrays again.
"""

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_file
from bloomlm.files.json_text import parse_json

_LOG = logging.getLogger(__name__)

_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F64": np.float64}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}

Arrays = Mapping[str, npt.NDArray[Any]]


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of a cache file, mapped read-only; None if it does not exist or is damaged, which causes a warning."""
    try:
        return _map_arrays(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        _LOG.warning("%s is damaged (%s: %s) and will be written again", path, type(error).__name__, error)
        return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a cache file atomically; a failure causes a warning.

    The library of safetensors would write under a temporary name of its own, which stays after a kill.
    """
    # the widest numbers first, so that each array begins at a multiple of its numbers' size
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    try:
        with atomic_file(path) as file:
            file.write(_header(ordered, _checksum(arrays)))
            for _, array in ordered:
                file.write(np.ascontiguousarray(array).data)
    except CheckpointError as error:
        _LOG.warning(
            "the result is not cached, so the next run computes it again: %s. "
            "Set BLOOMLM_CACHE to a writable directory with enough room",
            error,
        )


def _header(ordered: Sequence[tuple[str, npt.NDArray[Any]]], checksum: int) -> bytes:
    """The beginning of a safetensors file. Source: https://github.com/huggingface/safetensors#format"""
    entries: dict[str, Any] = {"__metadata__": {"crc32": str(checksum)}}
    stop = 0
    for name, array in ordered:
        start, stop = stop, stop + array.nbytes
        entries[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (start, stop)}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _map_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"its header should have {size} bytes, more than the file has")
        header = parse_json(file.read(size))
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start = 8 + size + entry["data_offsets"][0]
            shape = tuple(entry["shape"])
            arrays[name] = np.memmap(path, dtype=_DTYPES[entry["dtype"]], mode="r", offset=start, shape=shape)
    found, expected = _checksum(arrays), int(header["__metadata__"]["crc32"])
    if found != expected:
        raise ValueError(f"its checksum is {found}, not {expected}")
    return arrays


def _checksum(arrays: Arrays) -> int:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), total))
    return total
