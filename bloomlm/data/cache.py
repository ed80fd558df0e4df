"""Named arrays on disk, one file for each key, written atomically and mapped into memory when read.

A file is a safetensors file with a checksum of the arrays in its header. This module does not know their meaning.
Nothing here stops a run: a cache that cannot be read or written causes a warning, and the arrays are computed again.
"""

import json
import logging
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

_LOG = logging.getLogger(__name__)

_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}

Arrays = Mapping[str, npt.NDArray[Any]]


def default_cache_dir() -> Path:
    """$BLOOMLM_CACHE, else $XDG_CACHE_HOME/bloomlm, else ~/.cache/bloomlm: for files that bloomlm can make again."""
    if own := os.environ.get("BLOOMLM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bloomlm"


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of a cache file, mapped read-only; None if it does not exist or, with a warning, if it is damaged."""
    try:
        return _map_arrays(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _LOG.warning("%s is damaged (%s: %s); making it again", path, type(error).__name__, error)
        return None


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a cache file under another name and rename it; a failure only causes a warning."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        save_file(dict(arrays), temporary, metadata={"crc32": str(_checksum(arrays))})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        _LOG.warning(
            "tokenised examples are not cached, so the next run tokenises again: %s cannot be written (%s). "
            "Set BLOOMLM_CACHE to a directory with room that you may write to",
            path,
            error,
        )
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _map_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"its header says {size} bytes, more than the file")
        header = json.loads(file.read(size))
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
