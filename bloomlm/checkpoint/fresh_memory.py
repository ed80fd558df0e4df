"""Memory for tensors to be read into, in huge pages where the system has them.

The system gives memory page by page and clears every page; in pages of 4 KiB that takes longer than reading the bytes
from a fast disk. Source: transparent huge pages, https://docs.kernel.org/admin-guide/mm/transhuge.html.
"""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_LEAST_BYTES = 32 * 2**20
"""Smaller pieces come from malloc, which keeps them for the next one (allocator.py)."""


def fresh_memory(num_bytes: int) -> Tensor:
    """[num_bytes] uint8, aligned for every dtype, with undefined contents; returned to the system when it is freed."""
    if num_bytes < _LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
