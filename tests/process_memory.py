"""Memory as rows may find it, and as the system counts it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """Let torch.empty return NaN, which memory that was used before may hold."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resident_bytes() -> int:
    """Memory of this process that the system really holds, as Linux counts it in STATM, without that of mapped files."""
    _, resident, shared, *_ = map(int, STATM.read_text().split())
    return (resident - shared) * resource.getpagesize()
