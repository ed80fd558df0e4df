"""Flat arrays of numbers on disk, of any size, with a checksum for every block of 64 KiB.

NAME holds the numbers, little-endian and nothing else, so `numpy.memmap` opens it. NAME.crc holds the CRC-32 of each
block, which is compared whenever a block is read. Blocks are read by pread and not through a mapping: the pages that
are touched through a mapping count as memory of the process and, in a random order, soon are the whole file.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bloomlm.errors import DataError
from bloomlm.files.json_text import read_json

BLOCK_BYTES = 2**16
_CRC = np.dtype("<u4")


def crc_path(path: Path) -> Path:
    """Where the checksums of a file are."""
    return path.with_name(path.name + ".crc")


class BlockReader:
    """Reads parts of a finished file.

    Args:
        path: the file.
        dtype: of its numbers.
        length: how many it holds.

    Raises:
        DataError: the file or that of its checksums is missing, or has another size.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, length: int) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._length = length
        num_blocks = -(-length * self._dtype.itemsize // BLOCK_BYTES)
        for file, expected in ((path, length * self._dtype.itemsize), (crc_path(path), num_blocks * _CRC.itemsize)):
            found = file.stat().st_size if file.is_file() else 0
            if found != expected:
                raise damaged(path, f"{file.name} has {found:,} bytes, expected {expected:,}")
        self._checksums = np.fromfile(crc_path(path), dtype=_CRC)
        self._descriptor = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return self._length

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    @property
    def digest(self) -> int:
        """CRC-32 of all checksums, which differs for other numbers."""
        return zlib.crc32(self._checksums.tobytes())

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """A copy of the numbers from start to stop - 1.

        Raises:
            DataError: a block that holds some of them has another checksum than when it was written.
        """
        assert 0 <= start <= stop <= self._length, (start, stop, self._length)
        if start == stop:
            return np.empty(0, dtype=self._dtype)
        size = self._dtype.itemsize
        first, last = start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES)
        content = os.pread(self._descriptor, (last - first) * BLOCK_BYTES, first * BLOCK_BYTES)
        for number in range(first, last):
            at = (number - first) * BLOCK_BYTES
            if zlib.crc32(content[at : at + BLOCK_BYTES]) != self._checksums[number]:
                raise damaged(self.path, f"the block of 64 KiB at byte {number * BLOCK_BYTES:,} has changed")
        offset = start * size - first * BLOCK_BYTES
        return np.frombuffer(content, dtype=self._dtype, count=stop - start, offset=offset)


class BlockWriter:
    """Appends to a file, and continues one that a killed process left.

    Args:
        path: the file; what it holds beyond `length` is dropped.
        dtype: of its numbers.
        length: how many of them are safe, as `sync` returned it; 0: a new file.

    Raises:
        DataError: the file does not hold that many.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike, length: int = 0) -> None:
        self._dtype = np.dtype(dtype)
        num_bytes = length * self._dtype.itemsize
        found = path.stat().st_size if length else 0
        if found < num_bytes:
            raise damaged(path, f"it has {found:,} bytes, and {num_bytes:,} were written")
        self._files = [os.open(file, os.O_RDWR | os.O_CREAT, 0o644) for file in (path, crc_path(path))]
        self._whole_bytes = num_bytes - num_bytes % BLOCK_BYTES
        # the checksum of this part may be that of the whole block, which was written after the last sync
        self._tail = os.pread(self._files[0], num_bytes - self._whole_bytes, self._whole_bytes)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add numbers; they are safe after `sync`."""
        content = self._tail + values.astype(self._dtype, copy=False).tobytes()
        whole = len(content) - len(content) % BLOCK_BYTES
        self._write(content[:whole])
        self._whole_bytes += whole
        self._tail = content[whole:]

    def sync(self) -> int:
        """Flush everything to the disk, and return the number of numbers."""
        self._write(self._tail)
        num_bytes = self._whole_bytes + len(self._tail)
        os.ftruncate(self._files[0], num_bytes)
        os.ftruncate(self._files[1], -(-num_bytes // BLOCK_BYTES) * _CRC.itemsize)
        for file in self._files:
            os.fsync(file)
        return num_bytes // self._dtype.itemsize

    def close(self) -> None:
        """Close the files; what has not been flushed by `sync` is dropped when they are opened again."""
        for file in self._files:
            os.close(file)

    def _write(self, content: bytes) -> None:
        """Write blocks, the last of which may be short, after the whole ones."""
        starts = range(0, len(content), BLOCK_BYTES)
        checksums = np.array([zlib.crc32(content[at : at + BLOCK_BYTES]) for at in starts], dtype=_CRC)
        _write_at(self._files[0], content, self._whole_bytes)
        _write_at(self._files[1], checksums.tobytes(), self._whole_bytes // BLOCK_BYTES * _CRC.itemsize)


def _write_at(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_sizes(path: Path, names: Sequence[str], lists: Sequence[str] = ()) -> dict[str, Any]:
    """The object `size` of a JSON file beside such files.

    Args:
        path: the file.
        names: names of the numbers in it.
        lists: names of the lists of texts in it.

    Raises:
        DataError: it is damaged.
    """
    try:
        found = read_json(path)
        sizes = found["size"] if isinstance(found, dict) else None
        if not isinstance(sizes, dict) or sizes.keys() != {*names, *lists}:
            raise ValueError(f"expected the object 'size' with {', '.join([*names, *lists])}")
        wrong = [name for name in names if type(sizes[name]) is not int or not 0 <= sizes[name] < 2**63]
        wrong += [name for name in lists if not _are_texts(sizes[name])]
        if wrong:
            raise ValueError(f"{wrong[0]} is {sizes[wrong[0]]!r:.40}")
    except (OSError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error
    return sizes


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def damaged(path: Path, what: str) -> DataError:
    """The error that a file of a cached text is not what was written."""
    return DataError(f"{path} is damaged: {what}. Remove {path.parent}; the next run tokenises its texts again")


def cannot_write(directory: Path, error: Exception) -> DataError:
    """The error that the files of a text cannot be written."""
    return DataError(
        f"{directory} cannot be written ({getattr(error, 'strerror', None) or error}); the tokens of a text take about "
        "as much room as the text. What is done is kept, and the same command continues there. Free the disk, or set "
        "BLOOMLM_CACHE to a directory on another one"
    )
