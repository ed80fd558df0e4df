"""Memory to read into: bytes that can be written, in few pages, and given back."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from bloomlm.checkpoint.tensor_reader import fresh_memory
from tests.process_memory import STATM, resident_bytes

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 32 * 2**20, 40_000_001])
def test_every_byte_can_be_written_and_read(num_bytes: int) -> None:
    memory = fresh_memory(num_bytes)
    assert memory.dtype == torch.uint8 and memory.shape == (num_bytes,)
    expected = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    memory.copy_(expected)
    assert torch.equal(memory, expected)


def test_holds_every_dtype() -> None:
    memory = fresh_memory(40 * 2**20)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert memory.view(dtype).view(2, -1).fill_(1.5).sum() == 1.5 * 40 * 2**20 / dtype.itemsize


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts pages as Linux does")
def test_large_memory_comes_in_few_pages() -> None:
    if not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("this system has no transparent huge pages")
    memory = fresh_memory(64 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.fill_(1)
    # 16,384 pages of 4 KiB; some huge ones may not be had at once
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 8192


@pytest.mark.skipif(not STATM.exists(), reason="counts memory as Linux does")
def test_is_given_back() -> None:
    before = resident_bytes()
    memory = fresh_memory(256 * 2**20).fill_(1)
    view = memory.view(torch.float32)[1:].t()
    del memory
    assert resident_bytes() - before > 200 * 2**20
    del view
    assert resident_bytes() - before < 50 * 2**20
