"""A cache of named arrays on disk: safetensors files, written atomically and mapped into memory when read.

The header of a file holds a checksum of its arrays. A file that cannot be read or written causes a warning and never
stops a run: the caller computes the arrays again.
"""

import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from bloomlm.files.atomic import directory_beside
from bloomlm.files.json_text import parse_json

_LOG = logging.getLogger(__name__)

_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F64": np.float64}

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
    """Write a cache file atomically; a failure causes a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_beside(path) as temporary:
            save_file(dict(arrays), temporary / path.name, metadata={"crc32": str(_checksum(arrays))})
            (temporary / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        _LOG.warning(
            "the result is not cached, so the next run computes it again: %s cannot be written (%s). "
            "Set BLOOMLM_CACHE to a writable directory with enough room",
            path,
            error,
        )


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
