"""Freed memory is used again: a second allocation brings no new pages."""

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
if sys.argv[1] == "kept":
    from bloomlm.allocator import keep_freed_memory
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(2**24) for _ in range(16)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(way: str) -> int:
    """Page faults of 16 blocks of 16 MiB after as many were freed."""
    output = subprocess.run([sys.executable, "-c", MEASURE, way], check=True, capture_output=True, text=True).stdout
    return int(output)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is for glibc, and counts pages as Linux does")
def test_freed_memory_is_used_again() -> None:
    given_back = new_pages("given back")
    if given_back < 1000:
        pytest.skip(f"this C library keeps freed memory anyway: only {given_back} new pages without the setting")
    assert new_pages("kept") < given_back / 100
